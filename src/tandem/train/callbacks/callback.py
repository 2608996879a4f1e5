"""The hook for all that happens between steps, and the run as a callback sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.data.batching.sampler import StepSampler
from tandem.data.encoded.dataset import EncodedDataset
from tandem.recipe.jobs import TrainingJob
from tandem.runtime.console import StageProgress
from tandem.storage.atomic_files import append_jsonl
from tandem.train.checkpoint import CheckpointStore, RunState, forget_after
from tandem.train.engines.engine import Engine


@dataclass(frozen=True)
class StepReport:
    """A step that is done."""

    # as in a line of metrics.jsonl, every `logging_steps` and at the end; else empty
    metrics: dict[str, float]
    last: bool  # whether it is the run's last step


@dataclass
class TrainingRun:
    """A run of a training stage, the same in all processes."""

    stage: str  # its name, sft or dpo
    job: TrainingJob
    engine: Engine  # holds the model, and knows the device and the processes
    config: Any  # the model's transformers configuration
    dataset: EncodedDataset  # the records that are trained on
    sampler: StepSampler  # which of them a step has
    total_steps: int
    execution: Mapping[str, Any]  # how the work is done, as in the manifest
    log: Callable[[str], None]  # puts a line on the console
    callbacks: Sequence[Callback] = ()  # called in this order
    state: RunState = field(default_factory=RunState)  # where the run stands
    baseline_memory: int = 0  # bytes that this process held before it loaded the model
    stop_reason: str = ""  # why a callback asked to stop; empty if none did
    stopping: bool = False  # whether the run ends after this step; set for `before_next_step`
    finish_reason: str = ""  # why a callback finished the run early; empty if none did
    held_out: EncodedDataset | None = None  # the records that are scored and not trained on
    failure: str = ""  # what went wrong in a callback of the user's own; empty if nothing did
    checkpoint: Path | None = None  # the newest one that this run has written or begun with

    @property
    def folder(self) -> Path:
        """Where the stage writes."""
        return self.job.folder

    @property
    def epoch(self) -> float:
        """How many epochs, the last one in part, are done."""
        return round(self.sampler.epochs_after(self.state.step), 4)

    def ask_to_stop(self, reason: str) -> None:
        """End the run with a checkpoint after this step; one process that asks is enough."""
        self.stop_reason = reason

    def fail(self, what: str) -> None:
        """End the run with an error after this step's checkpoint; in all processes alike."""
        self.failure = self.failure or what

    def finish_early(self, reason: str) -> None:
        """Let this step be the last one of a finished run; asked for in all processes alike."""
        if not self.finish_reason:
            self.log(reason)
        self.finish_reason = reason

    def on_rank0(self, work: Callable[[], Any]) -> Any:
        """Run `work` in rank 0 alone; its result in every process."""
        return self.engine.processes.on_rank0(work)


class Callback:
    """Called at fixed points of a run, by all processes and in the order of the run's callbacks.

    Methods that a subclass leaves out do nothing. What only one process may do, such as writing a
    file, goes through `run.on_rank0`.
    """

    def check(self) -> None:
        """Before anything is loaded, in rank 0 alone: raise UserError for what could not work."""

    def on_set_up(self, run: TrainingRun, model: Any) -> None:
        """When data and model are there, and nothing is computed; `run.state` is a new run's."""

    def on_train_begin(self, run: TrainingRun) -> None:
        """Before the first step, or the first one after a resume."""

    def on_step_end(self, run: TrainingRun, report: StepReport) -> None:
        """After each step."""

    def on_early_end(self, run: TrainingRun, report: StepReport) -> None:
        """After `on_step_end` of the step that a callback finished the run with.

        Only where the step's line of metrics was not due: `report` has it.
        """

    def on_evaluate(self, run: TrainingRun, scores: Mapping[str, float]) -> None:
        """After held-out records were scored; `scores` as in a line of validation.jsonl."""

    def before_next_step(self, run: TrainingRun) -> None:
        """After `on_step_end` of all callbacks, when `run.stopping` is known."""

    def on_checkpoint(self, run: TrainingRun) -> None:
        """After a checkpoint was written."""

    def on_train_end(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        """After the last step; what is added to `summary` goes into summary.json."""

    def on_close(self, run: TrainingRun) -> None:
        """When the run is over, however it ended: let go of what is open; it must not raise."""


class MetricsLog(Callback):
    """Writes metrics.jsonl."""

    def on_train_begin(self, run: TrainingRun) -> None:
        """Forget lines beyond the last checkpoint, which a killed run may have logged."""
        run.on_rank0(lambda: forget_after(run.folder / "metrics.jsonl", run.state.step))

    def on_step_end(self, run: TrainingRun, report: StepReport) -> None:
        """Write a logged step's line."""
        if report.metrics:
            run.on_rank0(lambda: append_jsonl(run.folder / "metrics.jsonl", report.metrics))

    def on_early_end(self, run: TrainingRun, report: StepReport) -> None:
        """Write the last step's line."""
        self.on_step_end(run, report)


@dataclass
class ShowProgress(Callback):
    """Shows steps and scores on the console."""

    display: StageProgress

    def on_step_end(self, run: TrainingRun, report: StepReport) -> None:
        """Move the bar, or print a logged step's line."""
        self.display.advance(run.state.step, report.metrics)

    def on_early_end(self, run: TrainingRun, report: StepReport) -> None:
        """Show the last step's line."""
        self.on_step_end(run, report)

    def on_evaluate(self, run: TrainingRun, scores: Mapping[str, float]) -> None:
        """Show the scores."""
        self.display.scored(run.state.step, scores)


@dataclass
class SaveCheckpoints(Callback):
    """Writes a checkpoint every so many steps, after the last one, and where a run stops."""

    checkpoints: CheckpointStore
    every: int

    def before_next_step(self, run: TrainingRun) -> None:
        """Write the step's checkpoint, if it is due."""
        engine, step = run.engine, run.state.step
        ends = run.stopping or bool(run.finish_reason) or step >= run.total_steps
        if step % self.every and not ends:
            return
        trained, optimizer = engine.trained(), engine.optimizer_state()
        run.checkpoint = run.on_rank0(
            lambda: self.checkpoints.save(engine.model, trained, optimizer, run.state)
        )
        for callback in run.callbacks:
            callback.on_checkpoint(run)
