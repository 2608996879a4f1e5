"""The stages of a rehearsal, one after the other; training stages are stopped and resumed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.errors import Stopped, UserError
from tandem.pipeline import stage_jobs as jobs
from tandem.pipeline.default_callbacks import default_callbacks
from tandem.pipeline.rehearsal.findings import Notebook
from tandem.pipeline.rehearsal.looks import trained
from tandem.pipeline.run_pipeline import run_pipeline
from tandem.recipe.choices import TRAINING_STAGES
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.recipe import PipelineStage, Recipe, stages_of
from tandem.recipe.training_settings import TrainingSettings
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.storage.run_folder import model_in_run
from tandem.train.callbacks.callback import Callback, StepReport, TrainingRun
from tandem.wording import number


class StopAfter(Callback):
    """Ends a run with a checkpoint after so many steps, as a signal would."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, run: TrainingRun, report: StepReport) -> None:
        """Ask for the stop."""
        if run.state.step == self._steps and not report.last:
            run.ask_to_stop("a rehearsal stops here, to resume from the checkpoint")


def run_stages(recipe: Recipe, notebook: Notebook, console: Console) -> list[str]:
    """Run the stages of a shortened recipe up to the first that fails; returns those not reached.

    Each one leaves a finding.
    """
    planned = stages_of(recipe)
    for number_, stage in enumerate(planned):
        with notebook.trying(stage.name) as seen:
            seen += _run(recipe, stage, console)
        if notebook.failed:
            return [later.name for later in planned[number_ + 1 :]]
    return []


def _run(recipe: Recipe, stage: PipelineStage, console: Console) -> list[str]:
    """Run one stage; what it showed."""
    seen = []
    work = stage.stage.work
    section = trained(recipe).get(work)
    half = 0 if section is None else (section.max_steps or 0) // 2
    if half:
        _stop(recipe, stage, half, console)
        seen.append(f"stopped after step {half} and resumed")
    found, stops = _finish(recipe, stage, section, console)
    if stops:
        seen.append("a callback asked for a stop, and the stage was resumed")
    if work in TRAINING_STAGES:
        return [*_of_training(recipe, stage), *seen]
    if work == "evaluate":
        return _of_evaluation(found or {})
    summary = read_json(stage.folder / "summary.json")
    return _of_pairs(summary) if work == "pairs" else [_of_merge(summary)]


def _finish(
    recipe: Recipe, stage: PipelineStage, section: TrainingSettings | None, console: Console
) -> tuple[dict[str, Any] | None, int]:
    """Run a stage to its end, as often as callbacks stop it; what it found, and how often."""
    most = 0 if section is None else section.max_steps or 0
    for stops in range(most):
        try:
            return run_pipeline(recipe, until=stage.name, start=stage.name, console=console), stops
        except Stopped:
            continue
    return run_pipeline(recipe, until=stage.name, start=stage.name, console=console), most


def _stop(recipe: Recipe, stage: PipelineStage, steps: int, console: Console) -> None:
    """Begin a training stage, and stop it."""
    callbacks = [*default_callbacks(recipe), StopAfter(steps)]
    try:
        if stage.stage.work == "sft":
            from tandem.stages.sft import run_sft

            run_sft(jobs.sft_job(recipe), console, callbacks)
        else:
            from tandem.stages.dpo import run_dpo

            run_dpo(jobs.dpo_job(recipe, stage.stage.round), console, callbacks)
    except Stopped:
        return


def _of_training(recipe: Recipe, stage: PipelineStage) -> list[str]:
    summary = read_json(stage.folder / "summary.json")
    lines = read_jsonl(stage.folder / "metrics.jsonl")
    losses = [float(line["loss"]) for line in lines if "loss" in line]
    seen = [f"{len(lines)} steps, loss {number(losses[0])} to {number(losses[-1])}"]
    settings = trained(recipe)[stage.stage.work]
    if isinstance(settings, DpoSettings) and settings.needs_reference:
        seen.insert(0, "before the first step the policy equals the reference")
    if "validation" in summary:
        seen.append(f"held-out loss {number(summary['validation']['last']['eval_loss'])}")
    return seen


def _of_merge(summary: dict[str, Any]) -> str:
    text = f"{summary['merged_weights']} weights merged, compared {summary['checked']}"
    if summary["logp_difference"] is not None:
        text += f": log-probs within {number(summary['logp_difference'])} of base + adapter"
    return text


def _of_pairs(summary: dict[str, Any]) -> list[str]:
    return [f"{summary['kept']} pairs from {summary['prompts']} prompts, written and read back"]


def _of_evaluation(evaluation: dict[str, Any]) -> list[str]:
    """What was measured; raises UserError for a judge whose verdicts could not be read."""
    judged = evaluation.get("judge", {}).get("models", {})
    if unread := sum(int(one["unread"]) for one in judged.values()):
        raise UserError(
            f"evaluate.judge: {unread} verdicts could not be read. The judge must answer as "
            "docs/guide/evaluation.md says; take another model, or leave evaluate.judge out."
        )
    counts = ", ".join(f"{n} {what}" for what, n in evaluation.get("counts", {}).items() if n)
    names = ", ".join(evaluation.get("models", {}))
    tasks = evaluation.get("tasks")
    measured = [counts, "tasks" if tasks else ""]
    return [f"{names} measured on {' and '.join(filter(None, measured)) or 'nothing'}"]


def try_export(recipe: Recipe, notebook: Notebook, console: Console) -> None:
    """Write the last model as a GGUF file and compare it; a model that cannot be one is noted."""
    model = model_in_run(recipe.output_dir)
    if model == recipe.output_dir:
        return
    if find_spec("gguf") is None:
        notebook.not_shown.append("tandem export gguf (the package gguf is not installed here)")
        return
    from tandem.export.choices import ExportJob
    from tandem.export.export_gguf import export_gguf

    with notebook.trying("export") as seen:
        try:
            export_gguf(ExportJob(model, Path(recipe.output_dir, "model.gguf")), console)
        except UserError as error:
            notebook.note(f"tandem export gguf would refuse this model: {error}")
        else:
            seen.append("a GGUF file computes, cuts texts and ends answers as the model does")


def write_page(recipe: Recipe, notebook: Notebook) -> None:
    """Write the run's report, as its end does."""
    from tandem.report.html import write_report

    with notebook.trying("report") as seen:
        page = write_report(Path(recipe.output_dir))
        seen.append(f"{page.name} written")
