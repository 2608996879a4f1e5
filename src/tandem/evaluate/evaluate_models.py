"""All models answer the same questions and are measured on the same tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tandem.data.formats.conversations import Question
from tandem.data.read_records import read_questions
from tandem.data.resolve_sources import data_identity, resolve_sources
from tandem.data.sources.rows import not_read
from tandem.errors import UserError
from tandem.evaluate.eval_model import EvalModel, find_eval_model, tokenizer_identity
from tandem.evaluate.harness import TaskScores
from tandem.evaluate.harness_tasks import (
    TaskSettings,
    check_harness,
    describe_tasks,
    measure_tasks,
    selected_tasks,
    task_facts,
)
from tandem.evaluate.scores import (
    MeasurementStore,
    ModelScores,
    Score,
    compared,
    items_of,
    model_scores_of,
)
from tandem.evaluate.suites import Task, TaskSelection
from tandem.evaluate.win_rates import Duel, Judge, Verdicts, judge_duels, server_judge
from tandem.integrations.choose import device_names, device_of
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.jobs import EvaluationJob
from tandem.recipe.run_settings import RunSettings
from tandem.result_warnings import evaluation_warnings
from tandem.runtime.console import log, phase
from tandem.storage.atomic_files import atomic_write_json, read_json
from tandem.storage.folder_lock import folder_lock
from tandem.storage.hashing import hash_json
from tandem.storage.manifest import check_made, finish_stage, open_stage, read_manifest, start_stage

if TYPE_CHECKING:
    from tandem.evaluate.own_measures import Material
    from tandem.runtime.device import Device

# Folders of finished measurements, and of local tasks as the harness reads them.
_SCORES, _TASKS = "scores", "tasks"
_JUDGMENTS = "judgments.jsonl"
# The recipe's keys for data of the user's own.
_OWN = ("questions", "pairs", "heldout")


def evaluate_models(
    job: EvaluationJob, console: Console, judge: Judge | None = None
) -> dict[str, Any]:
    """Ask every model, write evaluation.json, and return what it says.

    `judge` compares each model's answers with the first model's; None: the settings' own, if they
    name one. Finished measurements (a model's own measures, a task of a model) stay in the folder.
    While verdicts are missing the stage stays unfinished: the same call asks for them again. An
    evaluation of some of the models, such as those of a run's first rounds, is added to. A finished
    stage is found without torch.
    """
    models, settings, run, output_dir = job.models, job.settings, job.run, job.folder
    tasks = selected_tasks(settings)
    check_harness(tasks)
    if judge is None and settings.judge is not None:
        judge = server_judge(settings.judge, console)
    if judge is not None and (not settings.questions or len(models) < 2):
        raise UserError(
            "judge: it compares answers to questions with the first model's; name questions, and "
            "two models or more"
        )
    eval_models = [find_eval_model(label, path, run.added_tokens) for label, path in models.items()]
    for folder in [f for model in eval_models for f in (model.folder, model.adapter) if f]:
        check_made(folder, lambda text: log(console, f"evaluate: {text}", style="yellow"))
    sources = {
        name: resolve_sources(getattr(settings, name), output_dir.parent, run.seed) for name in _OWN
    }
    data = {name: data_identity(named) for name, named in sources.items()}
    device = device_names(run)
    inputs = {
        "models": {model.label: model.identity for model in eval_models},
        **data,
        "tasks": [_identity(task) for task in tasks.tasks],
        "settings": settings.model_dump(mode="json", exclude={*_OWN, "task_data", "judge"}),
        "chat_template": run.chat_template,
        "added_tokens": list(run.added_tokens),
        "dtype": device.dtype_name,
        "device": device.kind,
        "attention": run.attention,
        **({} if judge is None else {"judge": judge.name}),
    }
    with folder_lock(output_dir, lambda text: log(console, f"evaluate: {text}")):
        path = output_dir / "evaluation.json"
        replaces = job.replace and _holds_another(output_dir, inputs)
        if not (replaces or _holds_part(output_dir, inputs)) and (
            open_stage(output_dir, "evaluate", inputs).state == "finished"
        ):
            finished: dict[str, Any] = read_json(path)
            return finished
        from tandem.evaluate.own_measures import Material

        start_stage(output_dir, "evaluate", inputs, {"models": dict(models)})
        for line in not_read([source for named in sources.values() for source in named]):
            log(console, line)
        for title, why in tasks.left_out:
            log(console, f"{title} is not measured: {why}")
        questions = sources["questions"]
        material = Material(
            read_questions(questions, settings.limit) if questions else [],
            sources["pairs"],
            sources["heldout"],
            settings.max_new_tokens,
            settings.limit,
        )
        evaluator = Evaluator(output_dir, settings, material, data, device_of(run), run, console)
        evaluation = evaluator.evaluate(models, eval_models, tasks, judge)
        atomic_write_json(path, evaluation)
        # Missing verdicts are asked for again, so the stage is not finished.
        if not any(one["unread"] for one in evaluation.get("judge", {}).get("models", {}).values()):
            finish_stage(output_dir, ["evaluation.json"])
    return evaluation


def _identity(task: Task) -> dict[str, Any]:
    data = "hub" if task.data is None else task.data.identity
    return {"task": task.name, "shots": task.shots, "data": data}


def _holds_another(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether a folder holds an evaluation of something else."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["stage"] != "evaluate":
        return False
    return hash_json(manifest["inputs"]) != hash_json(dict(inputs))


def _holds_part(folder: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether a folder holds the same evaluation of some of these models and of no others."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["stage"] != "evaluate":
        return False
    before = manifest["inputs"].get("models")
    if not isinstance(before, dict) or not before.keys() < inputs["models"].keys():
        return False
    kept = {label: inputs["models"][label] for label in before}
    return hash_json(manifest["inputs"]) == hash_json({**inputs, "models": kept})


@dataclass(frozen=True)
class Evaluator:
    """Measures models one after the other."""

    folder: Path  # the stage's
    settings: EvaluationSettings
    material: Material  # what models are asked and scored on
    data: Mapping[str, Any]  # hashes of the user's own data
    device: Device
    run: RunSettings
    console: Console

    @property
    def store(self) -> MeasurementStore:
        """Finished measurements."""
        return MeasurementStore(
            self.folder / _SCORES, lambda text: log(self.console, f"evaluate: {text}")
        )

    def evaluate(
        self,
        paths: Mapping[str, str],
        models: Sequence[EvalModel],
        tasks: TaskSelection,
        judge: Judge | None,
    ) -> dict[str, Any]:
        """All that is measured, as evaluation.json says it."""
        settings, definitions = self.settings, self.folder / _TASKS
        own = {model.label: self.own_scores(model) for model in models}
        size, template = str(settings.batch_size), self.run.chat_template
        how = TaskSettings(settings.limit, settings.chat, size, template)
        describe_tasks(tasks, definitions)
        places: dict[str, Any] = {
            "store": self.store, "definitions": definitions,
            "device": self.device, "console": self.console,
        }  # fmt: skip
        task_scores = {m.label: measure_tasks(m, tasks, how, **places) for m in models}
        verdicts = self.judge(judge, own) if judge is not None else {}
        evaluation = self._summary(paths, own, task_scores, verdicts)
        if judge is not None:
            evaluation["judge"] = {
                "name": judge.name,
                "against": next(iter(paths)),
                "models": {label: one.as_json() for label, one in verdicts.items()},
            }
        evaluation["tasks"] = task_facts(tasks, task_scores, how)
        evaluation["left_out"] = [list(one) for one in tasks.left_out]
        return evaluation

    def own_scores(self, model: EvalModel) -> ModelScores:
        """A model's own measures; finished ones come from the store."""
        if not self.material:
            return ModelScores({}, [])
        tokenizer, template = model.tokenizer(self.run.chat_template)
        completions = model.label == "base"
        key = {
            "model": model.identity,
            "tokenizer": tokenizer_identity(tokenizer, template),
            **self.data,
            "completions": completions,
            "max_new_tokens": self.material.max_new_tokens,
            "limit": self.material.limit,
            "dtype": self.device.dtype_name,
            "device": self.device.kind,
            "attention": self.run.attention,
        }
        if (before := self.store.find("own", key)) is not None:
            return model_scores_of(before)
        from tandem.evaluate.own_measures import OwnMeasures

        measures = OwnMeasures(model, tokenizer, template, self.device, self.run, self.console)
        scores = measures.take(self.material, completions=completions)
        self.store.keep("own", key, scores.as_json())
        return scores

    def judge(self, judge: Judge, own: Mapping[str, ModelScores]) -> dict[str, Verdicts]:
        """A judge's verdicts on all models but the first, against which they are compared."""
        questions = [question.turns[-1].content for question in self.material.questions]
        first, *others = own
        verdicts = {}
        for label in others:
            texts = zip(questions, own[label].answers, own[first].answers, strict=True)
            duels = [Duel(str(i), *each) for i, each in enumerate(texts)]
            with phase(self.console, f"{label}: {judge.name} judges", 2 * len(duels)) as advance:
                verdicts[label] = judge_duels(judge, duels, self.folder / _JUDGMENTS, advance)
            if unread := verdicts[label].unread:
                log(
                    self.console,
                    f"{label}: {unread} of {len(duels)} questions have no verdict of {judge.name}; "
                    "they are left out, and asked again when the evaluation is repeated",
                )
        return verdicts

    def _summary(
        self,
        paths: Mapping[str, str],
        own: Mapping[str, ModelScores],
        tasks: Mapping[str, Mapping[str, TaskScores]],
        verdicts: Mapping[str, Verdicts],
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
        questions, measured = self.material.questions, [one.scores for one in own.values()]
        pairs = items_of(measured, "preference_accuracy")
        counts = {"questions": len(questions), "pairs": pairs}
        if self.material.heldout:
            counts["conversations"] = items_of(measured, "heldout_loss")
        evaluation: dict[str, Any] = {
            "models": {label: {"path": paths[label], **figures[label]} for label in own},
            "counts": counts,
            "samples": _samples(questions, own, self.settings.samples),
        }
        seen = evaluation_warnings(evaluation)
        evaluation["warnings"] = [one.line for one in seen if one.level == "warning"]
        return evaluation


def _samples(
    questions: Sequence[Question], own: Mapping[str, ModelScores], count: int
) -> list[dict[str, Any]]:
    stride = max(1, len(questions) // max(1, count))
    return [
        {
            "prompt": questions[i].turns[-1].content,
            "expected": questions[i].answer,
            "answers": {label: one.answers[i] for label, one in own.items()},
        }
        for i in range(0, len(questions), stride)[:count]
    ]


def check_something(settings: EvaluationSettings) -> None:
    """Raise UserError for settings that measure nothing."""
    if not any(getattr(settings, name) for name in (*_OWN, "tasks", "suite")):
        raise UserError(
            "nothing to measure: name tasks (--tasks, --suite) or data of your own (--questions, "
            "--pairs, --heldout)"
        )
