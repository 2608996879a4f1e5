"""At the end: all models answer the same questions and are measured on the same tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.formats.known_formats import Question
from tandem.data.read_records import read_questions
from tandem.data.resolve_sources import data_identity, resolve_sources
from tandem.data.sources.rows import not_read
from tandem.errors import UserError
from tandem.evaluate.eval_model import Contestant, find_contestant, tokenizer_identity
from tandem.evaluate.harness import TaskScores
from tandem.evaluate.harness_tasks import (
    TaskSettings,
    check_harness,
    describe_tasks,
    measure_tasks,
    task_facts,
    tasks_of,
)
from tandem.evaluate.measurement_store import Kept
from tandem.evaluate.own_measures import Examined, Examiner, Material, examined_of
from tandem.evaluate.scores import Score, compared, items_of
from tandem.evaluate.suites import Plan, TaskPlan
from tandem.evaluate.win_rates import Duel, Judge, Verdicts, judge_duels, server_judge
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.run_settings import Runtime
from tandem.report.report_warnings import evaluation_findings, in_words
from tandem.runtime.console import log, phase
from tandem.runtime.device import Device, choose_device
from tandem.storage.atomic_files import atomic_write_json, read_json
from tandem.storage.folder_lock import folder_lock
from tandem.storage.hashing import hash_json
from tandem.storage.manifest import check_made, finish_stage, open_stage, read_manifest, start_stage

# Folders in the stage's own: finished measurements, and local tasks as the harness reads them.
_SCORES, _TASKS = "scores", "tasks"
_JUDGMENTS = "judgments.jsonl"
# The recipe's keys for data of the user's own.
_OWN = ("questions", "pairs", "heldout")


def run_evaluation(
    *,
    models: Mapping[str, str],
    settings: EvaluationSettings,
    output_dir: Path,
    chat_template: str | None,
    seed: int,
    runtime: Runtime,
    console: Console,
    added_tokens: tuple[str, ...] = (),
    judge: Judge | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Ask every model, write evaluation.json, and return what it says.

    Args:
        models: model or adapter folders by label; the one called "base" is asked in completion
            form as well.
        settings: questions, held-out data, tasks.
        output_dir: the stage's folder.
        chat_template: for models without one of their own.
        seed: of the embedded demo's data.
        runtime: device, dtype, attention.
        console: for progress.
        added_tokens: what that template needs, for models that lack it.
        judge: compares each model's answers with the first model's; None: the settings' own, if
            they name one.
        replace: whether an evaluation of other models or settings that is finished in the folder
            gives way; what it measured is used again.

    A finished measurement (a model's own measures, a task of a model) is kept in the folder, and
    not made again after a kill. While verdicts are missing the stage stays unfinished: the same
    call asks for them again.
    """
    plan = tasks_of(settings)
    check_harness(plan)
    if judge is None and settings.judge is not None:
        judge = server_judge(settings.judge, console)
    contestants = [find_contestant(label, path, added_tokens) for label, path in models.items()]
    for one in contestants:
        for folder in (one.folder, *([one.adapter] if one.adapter else [])):
            check_made(folder, lambda text: log(console, f"evaluate: {text}", style="yellow"))
    sources = {
        name: resolve_sources(getattr(settings, name), output_dir.parent, seed) for name in _OWN
    }
    data = {name: data_identity(specs) for name, specs in sources.items()}
    device = choose_device(runtime.device, runtime.dtype, runtime.hpu)
    inputs = {
        "models": {c.label: c.identity for c in contestants},
        **data,
        "tasks": [_identity(task) for task in plan.tasks],
        "settings": settings.model_dump(mode="json", exclude={*_OWN, "task_data", "judge"}),
        "chat_template": chat_template,
        "added_tokens": list(added_tokens),
        "dtype": device.dtype_name,
        "device": device.kind,
        "attention": runtime.attention,
    }
    if judge is not None:
        _check_judged(models, settings)
        inputs["judge"] = judge.name
    with folder_lock(output_dir, lambda text: log(console, f"evaluate: {text}")):
        path = output_dir / "evaluation.json"
        if not (replace and _holds_another(output_dir, inputs)) and (
            open_stage(output_dir, "evaluate", inputs).state == "finished"
        ):
            found: dict[str, Any] = read_json(path)
            return found
        start_stage(output_dir, "evaluate", inputs, {"models": dict(models)})
        for line in not_read([spec for specs in sources.values() for spec in specs]):
            log(console, line)
        for title, why in plan.left_out:
            log(console, f"{title} is not measured: {why}")
        questions = sources["questions"]
        material = Material(
            read_questions(questions, settings.limit) if questions else [],
            sources["pairs"],
            sources["heldout"],
            settings.max_new_tokens,
            settings.limit,
        )
        desk = _Desk(output_dir, material, data, chat_template, device, runtime, console)
        evaluation = desk.evaluate(models, contestants, plan, settings, judge)
        atomic_write_json(path, evaluation)
        # What has no verdict is asked again, so that there is more to do.
        if not any(one["unread"] for one in evaluation.get("judge", {}).get("models", {}).values()):
            finish_stage(output_dir, ["evaluation.json"])
    return evaluation


def _identity(task: TaskPlan) -> dict[str, Any]:
    data = "hub" if task.data is None else task.data.identity
    return {"task": task.name, "shots": task.shots, "data": data}


def _holds_another(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether a folder holds an evaluation of something else."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["stage"] != "evaluate":
        return False
    return hash_json(manifest["inputs"]) != hash_json(dict(inputs))


class _Desk:
    """Where models are examined, one after the other."""

    def __init__(
        self,
        folder: Path,
        material: Material,
        data: Mapping[str, Any],
        chat_template: str | None,
        device: Device,
        runtime: Runtime,
        console: Console,
    ) -> None:
        self.folder = folder
        self.material = material
        self.data = data
        self.chat_template = chat_template
        self.device = device
        self.runtime = runtime
        self.console = console
        self.kept = Kept(folder / _SCORES, lambda text: log(console, f"evaluate: {text}"))

    def evaluate(
        self,
        models: Mapping[str, str],
        contestants: Sequence[Contestant],
        plan: Plan,
        settings: EvaluationSettings,
        judge: Judge | None,
    ) -> dict[str, Any]:
        """All that is measured, as evaluation.json says it."""
        own = {c.label: self.examine(c) for c in contestants}
        how = TaskSettings(
            settings.limit, settings.chat, str(settings.batch_size), self.chat_template
        )
        tasks = self.measure(contestants, plan, how)
        verdicts = self.judge(judge, own) if judge is not None else {}
        evaluation = _evaluation(models, self.material, own, tasks, verdicts, settings)
        if judge is not None:
            evaluation["judge"] = {
                "name": judge.name,
                "against": next(iter(models)),
                "models": {label: one.as_json() for label, one in verdicts.items()},
            }
        evaluation["tasks"] = task_facts(plan, tasks, how)
        evaluation["left_out"] = [list(one) for one in plan.left_out]
        return evaluation

    def examine(self, contestant: Contestant) -> Examined:
        """A model's own measures."""
        if not self.material:
            return Examined({}, [])
        tokenizer, template = contestant.tokenizer(self.chat_template)
        completions = contestant.label == "base"
        key = {
            "model": contestant.identity,
            "tokenizer": tokenizer_identity(tokenizer, template),
            **self.data,
            "completions": completions,
            "max_new_tokens": self.material.max_new_tokens,
            "limit": self.material.limit,
            "dtype": self.device.dtype_name,
            "device": self.device.kind,
            "attention": self.runtime.attention,
        }
        if (before := self.kept.find("own", key)) is not None:
            return examined_of(before)
        examiner = Examiner(
            contestant, tokenizer, template, self.device, self.runtime, self.console
        )
        found = examiner.examine(self.material, completions=completions)
        self.kept.keep("own", key, found.as_json())
        return found

    def measure(
        self, contestants: Sequence[Contestant], plan: Plan, settings: TaskSettings
    ) -> dict[str, dict[str, TaskScores]]:
        """The tasks' scores of all models."""
        definitions = self.folder / _TASKS
        describe_tasks(plan, definitions)
        return {
            contestant.label: measure_tasks(
                contestant,
                plan,
                settings,
                kept=self.kept,
                definitions=definitions,
                device=self.device,
                console=self.console,
            )
            for contestant in contestants
        }

    def judge(self, judge: Judge, own: Mapping[str, Examined]) -> dict[str, Verdicts]:
        """What a judge finds of all models but the first, against whom they are compared."""
        questions = self.material.questions
        first, *others = own
        found = {}
        for label in others:
            duels = [
                Duel(str(i), question.turns[-1].content, answer, against)
                for i, (question, answer, against) in enumerate(
                    zip(questions, own[label].answers, own[first].answers, strict=True)
                )
            ]
            with phase(self.console, f"{label}: {judge.name} judges", 2 * len(duels)) as advance:
                found[label] = judge_duels(judge, duels, self.folder / _JUDGMENTS, advance)
            if unread := found[label].unread:
                log(
                    self.console,
                    f"{label}: {unread} of {len(duels)} questions have no verdict of {judge.name}; "
                    "they are left out, and asked again when the evaluation is repeated",
                )
        return found


def _evaluation(
    models: Mapping[str, str],
    material: Material,
    own: Mapping[str, Examined],
    tasks: Mapping[str, Mapping[str, TaskScores]],
    verdicts: Mapping[str, Verdicts],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    scores: dict[str, dict[str, Score]] = {
        label: {
            **one.scores,
            **{f"task:{name}": t.metrics[t.metric] for name, t in tasks[label].items()},
            **({"win_rate": verdicts[label].score} if label in verdicts else {}),
        }
        for label, one in own.items()
    }
    figures = compared(scores)
    counts = {
        "questions": len(material.questions),
        "pairs": items_of([one.scores for one in own.values()], "preference_accuracy"),
    }
    if material.heldout:
        counts["conversations"] = items_of([one.scores for one in own.values()], "heldout_loss")
    evaluation: dict[str, Any] = {
        "models": {label: {"path": models[label], **figures[label]} for label in own},
        "counts": counts,
        "samples": _samples(material.questions, own, settings.samples),
    }
    found = evaluation_findings(evaluation)
    evaluation["warnings"] = [in_words(one) for one in found if one.level == "warning"]
    return evaluation


def _samples(
    questions: Sequence[Question], asked: Mapping[str, Examined], count: int
) -> list[dict[str, Any]]:
    stride = max(1, len(questions) // max(1, count))
    return [
        {
            "prompt": questions[i].turns[-1].content,
            "expected": questions[i].answer,
            "answers": {label: one.answers[i] for label, one in asked.items()},
        }
        for i in range(0, len(questions), stride)[:count]
    ]


def _check_judged(models: Mapping[str, str], settings: EvaluationSettings) -> None:
    if not settings.questions or len(models) < 2:
        raise UserError(
            "judge: it compares answers to questions with the first model's; name questions, and "
            "two models or more"
        )


def check_something(settings: EvaluationSettings) -> None:
    """Raise UserError for settings that measure nothing."""
    if not (
        settings.questions or settings.pairs or settings.heldout or settings.tasks or settings.suite
    ):
        raise UserError(
            "nothing to measure: name tasks (--tasks, --suite) or data of your own (--questions, "
            "--pairs, --heldout)"
        )
