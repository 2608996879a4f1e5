"""The callbacks that commands add to every training stage."""

from __future__ import annotations

from typing import Any

from tandem.integrations.tracking import Tracking
from tandem.model.attention.select import is_padded
from tandem.plan.stage_estimate import (
    StageEstimate,
    StageSetup,
    compare,
    estimate_run,
    remember_run,
)
from tandem.recipe.run_settings import RunSettings
from tandem.train.callbacks.callback import Callback, TrainingRun
from tandem.train.callbacks.user_callbacks import UserCallbacks


def default_callbacks(run: RunSettings) -> list[Callback]:
    """The callbacks of a stage of a run, or of a stage alone."""
    return [EstimateRun(), UserCallbacks(run.callbacks), Tracking(run)]


class EstimateRun(Callback):
    """Estimates a run before it begins, and compares the estimate with what came of it."""

    def __init__(self) -> None:
        self._estimate: StageEstimate | None = None

    def on_set_up(self, run: TrainingRun, model: Any) -> None:
        """Estimate time and memory in rank 0; whatever is strange about a model, it trains."""
        if not run.engine.processes.is_rank0:
            return
        try:
            setup = StageSetup(
                name=run.stage,
                settings=run.job.settings,
                device=run.engine.device,
                processes=run.engine.processes.count,
                engine=run.execution["engine"],
                config=run.config,
                seed=run.job.run.seed,
                budget=run.execution["tokens_per_microbatch"],
                padded=is_padded(model),
                quantized=run.job.run.quantization is not None,
                baseline=run.baseline_memory,
            )
            self._estimate = estimate_run(setup, model, run.dataset, run.sampler.sources)
        except Exception as error:
            run.log(f"this run is not estimated ({type(error).__name__}: {error})")

    def on_train_end(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        """Add the comparison to the summary, and keep this run's rate for the next plan."""
        if self._estimate is None:
            return
        summary["estimate"] = compare(self._estimate, summary)
        if run.state.step < run.total_steps:
            return  # ended early: its time is not that of the estimated work
        try:
            remember_run(self._estimate, summary["estimate"], summary)
        except OSError as error:
            run.log(f"the speed of this run cannot be recorded for the next plan ({error})")
