"""A function that is told each logged step, as a callback of training."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.api.result import OnStep
from tandem.train.callbacks.callback import Callback, StepReport, TrainingRun


@dataclass
class StepCallback(Callback):
    """Calls a function in rank 0 with each line of metrics."""

    function: OnStep

    def on_step_end(self, run: TrainingRun, report: StepReport) -> None:
        """Call it where the step was logged; ask for an end if it says so."""
        if not report.metrics:
            return
        answer = run.on_rank0(lambda: self.function(dict(report.metrics)))
        if answer == "stop":
            run.ask_to_stop("on_step asked for it")

    def on_early_end(self, run: TrainingRun, report: StepReport) -> None:
        """Tell it the last step."""
        self.on_step_end(run, report)
