"""Ends a run, as a finished one, once its held-out scores no longer improve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.train.callbacks.callback import Callback, TrainingRun
from tandem.train.callbacks.held_out_evaluation import Best


@dataclass
class EarlyStopping(Callback):
    """Counts scores in a row that do not improve; the count is in every checkpoint.

    The score before the first step is not one of them: in DPO, rounding alone decides then which
    answer gained more.
    """

    name: str  # the recipe's name of the metric
    best: Best  # the metric, and which way is up
    patience: int
    min_delta: float

    def on_train_begin(self, run: TrainingRun) -> None:
        """End a run that had decided so before it was interrupted."""
        self._end_if_due(run)

    def on_evaluate(self, run: TrainingRun, scores: Mapping[str, float]) -> None:
        """Count a score, and end the run after this step when it is one too many."""
        state, value = run.state, scores[f"eval_{self.best.metric}"]
        if state.step == 0:
            return
        if self.best.better(value, state.early_best, by=self.min_delta):
            state.early_best, state.early_step, state.early_waited = value, state.step, 0
        else:
            state.early_waited += 1
        self._end_if_due(run)

    def on_train_end(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        """Say in summary.json whether and why the run ended early; null where it did not."""
        early = run.state.step < run.total_steps
        summary["early_stopping"] = {
            "step": run.state.step, "of": run.total_steps, "best_step": run.state.early_step,
            "reason": run.finish_reason,
        } if early else None  # fmt: skip

    def _end_if_due(self, run: TrainingRun) -> None:
        state = run.state
        if state.early_waited < self.patience or state.step >= run.total_steps:
            return
        more = f" by more than {self.min_delta:g}" if self.min_delta else ""
        times = "once" if self.patience == 1 else f"{self.patience} times in a row"
        run.finish_early(
            f"early stopping after step {state.step} of {run.total_steps}: the held-out "
            f"{self.name} has not improved{more} {times} since {state.early_best:.4f} at step "
            f"{state.early_step}"
        )
