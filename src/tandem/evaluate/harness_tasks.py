"""Measures a model on the harness's tasks, and keeps each finished one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tandem.data.tokenize.vocabulary import require_rows, tokens_without_row
from tandem.errors import require
from tandem.evaluate.eval_model import EvalModel, tokenizer_identity
from tandem.evaluate.harness import Harness, HarnessModel, TaskScores, check_names, task_scores_of
from tandem.evaluate.scores import MeasurementStore
from tandem.evaluate.suites import Task, TaskSelection, select_tasks, write_tasks
from tandem.evaluate.task_forms import FORMS
from tandem.model.model_folder import described_rows
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.runtime.console import log, phase
from tandem.storage.hashing import hash_json

if TYPE_CHECKING:
    from tandem.runtime.device import Device

# Devices on which the harness loads a model itself; elsewhere it gets a loaded one.
_HARNESS_DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are measured: the recipe's keys of these names, and the fallback template."""

    limit: int | None
    chat: bool
    batch_size: str
    chat_template: str | None


def selected_tasks(settings: EvaluationSettings) -> TaskSelection:
    """The harness's tasks that the settings ask for; raises UserError for data not there."""
    folder = None if settings.task_data is None else Path(settings.task_data).expanduser()
    return select_tasks(settings.tasks, settings.suite, folder, settings.num_fewshot)


def check_harness(selection: TaskSelection) -> None:
    """Raise UserError if there are tasks and no harness, or one that it does not have."""
    if selection.tasks:
        require("lm-eval", "eval", "tasks: lm-evaluation-harness")
        check_names([t.harness_name for t in selection.tasks if t.data is None and not t.of_suite])


def describe_tasks(selection: TaskSelection, folder: Path) -> None:
    """Write the definitions of local tasks, which the harness's own command reads as well."""
    for task in selection.tasks:
        if task.data is not None:
            write_tasks(task.data, task.harness_name, task.shots, folder)


def measure_tasks(
    model: EvalModel,
    selection: TaskSelection,
    settings: TaskSettings,
    *,
    store: MeasurementStore,
    definitions: Path,
    device: Device,
    console: Console,
) -> dict[str, TaskScores]:
    """Each task's scores by name, from the store where they are; `definitions` has local tasks."""
    if not selection.tasks:
        return {}
    tokenizer, template = model.tokenizer(settings.chat_template)
    same = {
        "model": model.identity,
        "tokenizer": tokenizer_identity(tokenizer, template if settings.chat else None),
        "limit": settings.limit,
        "chat": settings.chat,
        "batch_size": settings.batch_size,
        "dtype": device.dtype_name,
        "device": device.kind,
        "versions": {name: metadata.version(name) for name in ("lm-eval", "torch", "transformers")},
    }
    scores: dict[str, TaskScores] = {}
    with ExitStack() as stack:
        harness: Harness | None = None
        for task in selection.tasks:
            key = {**same, **_task_key(task)}
            if (before := store.find(task.name, key)) is not None:
                scores[task.name] = task_scores_of(before)
                log(console, f"{model.label}: {task.title} was measured before")
                continue
            if harness is None:
                loaded = harness_model(model, tokenizer, settings, device)
                harness = stack.enter_context(Harness(loaded, definitions, hub=selection.needs_hub))
            scores[task.name] = _measure(harness, task, settings, console, model.label)
            store.keep(task.name, key, scores[task.name].as_json())
    return scores


def _task_key(task: Task) -> dict[str, Any]:
    local = task.data
    return {
        "task": task.name,
        "shots": task.shots,
        "metric": task.metric,
        "data": "hub" if local is None else local.identity,
        "definition": None if local is None else hash_json(FORMS[local.form].task),
    }


def harness_model(
    model: EvalModel, tokenizer: Any, settings: TaskSettings, device: Device
) -> HarnessModel:
    """A model as the harness is to load it, or loaded where the harness cannot."""
    from tandem.model.added_tokens import rows_of
    from tandem.model.lora.adapter import added_ids_of_folder

    own = model.quantized or model.grows or model.stays_stored(device)
    if own or device.kind not in _HARNESS_DEVICES:
        pretrained, adapter = model.with_adapter(model.load_base(device)), None
        rows = rows_of(pretrained)
    else:
        pretrained, adapter = str(model.folder), model.adapter
        ids = [] if adapter is None else added_ids_of_folder(adapter)
        rows = max([described_rows(model.config), *(index + 1 for index in ids)])
    check = partial(require_rows, rows=rows, decode=tokenizer.decode)
    return HarnessModel(
        pretrained, adapter, tokenizer, device.dtype_name, str(device.torch_device),
        settings.batch_size, check if tokens_without_row(tokenizer, rows) else None,
    )  # fmt: skip


def _measure(
    harness: Harness, task: Task, settings: TaskSettings, console: Console, label: str
) -> TaskScores:
    with ExitStack() as stack:
        bars: list[Any] = []

        def advance(count: int, total: int | None) -> None:
            # The harness says how many requests there are when it has made them.
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
    selection: TaskSelection,
    measured: Mapping[str, Mapping[str, TaskScores]],
    settings: TaskSettings,
) -> list[dict[str, Any]]:
    """What evaluation.json says of the tasks themselves; `measured` by model, then by task."""
    facts = []
    for task in selection.tasks:
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
