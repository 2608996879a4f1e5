"""The stages of a rehearsal, one after the other; training stages are stopped and resumed."""

from __future__ import annotations

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
from tandem.storage.atomic_files import read_json, read_jsonl
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
    section = trained(recipe).get(stage.name)
    half = 0 if section is None else (section.max_steps or 0) // 2
    if half:
        _stop(recipe, stage, half, console)
        seen.append(f"stopped after step {half} and resumed")
    found = run_pipeline(recipe, until=stage.name, start=stage.name, console=console)
    if stage.name in TRAINING_STAGES:
        return [*_of_training(recipe, stage), *seen]
    if stage.name == "evaluate":
        return _of_evaluation(found or {})
    summary = read_json(stage.folder / "summary.json")
    return _of_pairs(summary) if stage.name == "pairs" else [_of_merge(summary)]


def _stop(recipe: Recipe, stage: PipelineStage, steps: int, console: Console) -> None:
    """Begin a training stage, and stop it."""
    callbacks = [*default_callbacks(), StopAfter(steps)]
    try:
        if stage.name == "sft":
            from tandem.stages.sft import run_sft

            run_sft(jobs.sft_job(recipe), console, callbacks)
        else:
            from tandem.stages.dpo import run_dpo

            run_dpo(jobs.dpo_job(recipe), console, callbacks)
    except Stopped:
        return


def _of_training(recipe: Recipe, stage: PipelineStage) -> list[str]:
    summary = read_json(stage.folder / "summary.json")
    lines = read_jsonl(stage.folder / "metrics.jsonl")
    losses = [float(line["loss"]) for line in lines if "loss" in line]
    seen = [f"{len(lines)} steps, loss {number(losses[0])} to {number(losses[-1])}"]
    settings = trained(recipe)[stage.name]
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


def write_page(recipe: Recipe, notebook: Notebook) -> None:
    """Write the run's report, as its end does."""
    from tandem.report.html import write_report

    with notebook.trying("report") as seen:
        page = write_report(Path(recipe.output_dir))
        seen.append(f"{page.name} written")
