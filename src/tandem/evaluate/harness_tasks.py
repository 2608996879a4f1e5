"""The harness's tasks on one model, each finished one kept."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.tokenize.added_tokens import require_rows, tokens_without_row
from tandem.evaluate.eval_model import Contestant, tokenizer_identity
from tandem.evaluate.harness import Harness, Subject, TaskScores, check_names, task_scores_of
from tandem.evaluate.local_tasks import write_tasks
from tandem.evaluate.measurement_store import Kept
from tandem.evaluate.suites import Plan, TaskPlan, plan_tasks
from tandem.evaluate.task_forms import FORMS
from tandem.model.added_tokens import described_rows, rows_of
from tandem.model.lora.adapter import added_ids_of_folder
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.runtime.console import log, phase
from tandem.runtime.device import Device
from tandem.runtime.extras import require
from tandem.storage.hashing import hash_json

# Where the harness puts a model by itself; elsewhere it gets one that is there.
_HARNESS_DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are measured: the recipe's keys of these names, and the fallback template."""

    limit: int | None
    chat: bool
    batch_size: str
    chat_template: str | None


def tasks_of(settings: EvaluationSettings) -> Plan:
    """The harness's tasks that the settings ask for; raises UserError for data not there."""
    folder = None if settings.task_data is None else Path(settings.task_data).expanduser()
    return plan_tasks(settings.tasks, settings.suite, folder, settings.num_fewshot)


def check_harness(plan: Plan) -> None:
    """Raise UserError if there are tasks and no harness, or one that it does not have."""
    if plan.tasks:
        require("lm-eval", "eval", "tasks: lm-evaluation-harness")
        check_names([t.harness_name for t in plan.tasks if t.data is None and not t.of_suite])


def describe_tasks(plan: Plan, folder: Path) -> None:
    """Write the definitions of local tasks, which the harness's own command reads as well."""
    for task in plan.tasks:
        if task.data is not None:
            write_tasks(task.data, task.harness_name, task.shots, folder)


def measure_tasks(
    contestant: Contestant,
    plan: Plan,
    settings: TaskSettings,
    *,
    kept: Kept,
    definitions: Path,
    device: Device,
    console: Console,
) -> dict[str, TaskScores]:
    """Each task's scores by name; those that are kept are not measured again.

    Args:
        contestant: the model.
        plan: the tasks.
        settings: how they are measured.
        kept: finished measurements.
        definitions: folder of local tasks' definitions; see `describe_tasks`.
        device: where the model goes, and its dtype.
        console: for progress.
    """
    if not plan.tasks:
        return {}
    tokenizer, template = contestant.tokenizer(settings.chat_template)
    same = {
        "model": contestant.identity,
        "tokenizer": tokenizer_identity(tokenizer, template if settings.chat else None),
        "limit": settings.limit,
        "chat": settings.chat,
        "batch_size": settings.batch_size,
        "dtype": device.dtype_name,
        "device": device.kind,
        "versions": {name: metadata.version(name) for name in ("lm-eval", "torch", "transformers")},
    }
    found: dict[str, TaskScores] = {}
    with ExitStack() as stack:
        harness: Harness | None = None
        for task in plan.tasks:
            key = {**same, **_task_key(task)}
            if (before := kept.find(task.name, key)) is not None:
                found[task.name] = task_scores_of(before)
                log(console, f"{contestant.label}: {task.title} was measured before")
                continue
            if harness is None:
                subject = _subject(contestant, tokenizer, settings, device)
                harness = stack.enter_context(Harness(subject, definitions, hub=plan.needs_hub))
            scores = _measure(harness, task, settings, console, contestant.label)
            kept.keep(task.name, key, scores.as_json())
            found[task.name] = scores
    return found


def _task_key(task: TaskPlan) -> dict[str, Any]:
    local = task.data
    return {
        "task": task.name,
        "shots": task.shots,
        "metric": task.metric,
        "data": "hub" if local is None else local.identity,
        "definition": None if local is None else hash_json(FORMS[local.form].task),
    }


def _subject(
    contestant: Contestant, tokenizer: Any, settings: TaskSettings, device: Device
) -> Subject:
    if contestant.quantized or contestant.grows or device.kind not in _HARNESS_DEVICES:
        pretrained = contestant.with_adapter(contestant.load_base(device))
        adapter = None
    else:
        pretrained, adapter = str(contestant.folder), contestant.adapter
    ids = [] if adapter is None else added_ids_of_folder(adapter)
    rows = max([described_rows(contestant.config), *(index + 1 for index in ids)])
    if not isinstance(pretrained, str):
        rows = rows_of(pretrained)
    look = partial(require_rows, rows=rows, decode=tokenizer.decode)
    return Subject(
        pretrained,
        adapter,
        tokenizer,
        device.dtype_name,
        str(device.torch_device),
        settings.batch_size,
        look if tokens_without_row(tokenizer, rows) else None,
    )


def _measure(
    harness: Harness, task: TaskPlan, settings: TaskSettings, console: Console, label: str
) -> TaskScores:
    with ExitStack() as stack:
        bars: list[Any] = []

        def advance(count: int, total: int | None) -> None:
            # How many requests there are, the harness says when it has made them.
            if total is not None:
                bars.append(stack.enter_context(phase(console, f"{label}: {task.title}", total)))
            elif bars:
                bars[-1](count)

        scores = harness.measure(task, limit=settings.limit, chat=settings.chat, advance=advance)
    if scores.cut:
        log(
            console,
            f"{label}: {task.title}: {scores.cut} requests were longer than the model's context; "
            "their beginning, few-shot examples first, was cut off",
        )
    return scores


def task_facts(
    plan: Plan, measured: Mapping[str, Mapping[str, TaskScores]], settings: TaskSettings
) -> list[dict[str, Any]]:
    """What evaluation.json says of the tasks themselves, those left out among them.

    Args:
        plan: the tasks.
        measured: by model, then by task.
        settings: how they were measured.
    """
    facts: list[dict[str, Any]] = []
    for task in plan.tasks:
        first = next(iter(measured.values()))[task.name]
        facts.append(
            {
                "task": task.name,
                "title": task.title,
                "metric": first.metric,
                "shots": first.shots,
                "items": len(first.metrics[first.metric].items),
                "limit": settings.limit,
                "chat": settings.chat,
                "version": first.version,
                "notes": list(task.notes),
                "cut": {label: scores[task.name].cut for label, scores in measured.items()},
            }
        )
    return facts
