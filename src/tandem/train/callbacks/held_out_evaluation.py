"""Held-out records scored between steps with the model as it stands, and the best adapter kept."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from tandem.data.batching.sampler import Step
from tandem.model.trained_weights import TrainedWeights
from tandem.storage.atomic_files import append_jsonl
from tandem.storage.hashing import Damaged
from tandem.train.callbacks.callback import Callback, StepReport, TrainingRun
from tandem.train.checkpoint import CheckpointStore, RunState, forget_after, read_checkpoint
from tandem.train.step import StepRunner, added

# Records that are scored before their sums are exchanged.
_BLOCK = 1024


@dataclass(frozen=True)
class Best:
    """What makes one adapter better than another: a metric's name, and which way is up."""

    metric: str
    higher: bool

    def better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        """Whether a value beats another by more than a difference; an equal one does not."""
        return than is None or (value > than + by if self.higher else value < than - by)


@dataclass
class HeldOutEvaluation(Callback):
    """Scores the held-out records before the first step, on the way and at the end.

    It draws nothing at random and leaves gradients and optimizer alone, so that training does not
    depend on it. Every line of validation.jsonl is one score.
    """

    runner: StepRunner  # of the held-out records, without a backward
    every: int  # steps from one score to the next
    best: Best | None  # what makes an adapter the best, if that one is to be kept
    kept: CheckpointStore  # where the best adapters are kept
    checkpoints: CheckpointStore  # the run's; a best adapter stays while one of them remembers it

    def on_train_begin(self, run: TrainingRun) -> None:
        """Forget scores beyond the step that the run resumes from; score before the first one."""
        # Scores precede the step's checkpoint, so none is missing up to there.
        first = run.state.step == 0
        known = -1 if first else run.state.step
        run.on_rank0(lambda: forget_after(run.folder / "validation.jsonl", known))
        if first:
            self._score(run)

    def on_step_end(self, run: TrainingRun, report: StepReport) -> None:
        """Score every so many steps, and at the end."""
        if report.last or run.state.step % self.every == 0:
            self._score(run)

    def on_checkpoint(self, run: TrainingRun) -> None:
        """Forget best adapters that neither the run nor a checkpoint of it can come back to."""
        run.on_rank0(self._forget_unneeded)

    def _score(self, run: TrainingRun) -> None:
        """Score all held-out records and write the line; keep the adapter if it is the best yet."""
        state, model = run.state, run.engine.model
        began = time.perf_counter()
        model.eval()
        sums: dict[str, float] = {}
        count, total = 0, len(self.runner.examples)
        with run.engine.result_in_place():
            for start in range(0, total, _BLOCK):
                block = tuple(range(start, min(start + _BLOCK, total)))
                result = self.runner.run(Step(state.step, 0, block))
                sums, count = added([sums, result.sums]), count + result.work.denominator
        model.train()
        metrics = self.runner.objective.metrics({**sums, "count": float(count)})
        seconds = time.perf_counter() - began
        state.validation_seconds += seconds
        line = {
            "step": state.step,
            "epoch": run.epoch,
            **{f"eval_{name}": value for name, value in metrics.items()},
            "eval_seconds": seconds,
        }
        run.on_rank0(lambda: append_jsonl(run.folder / "validation.jsonl", line))
        self._keep(run, metrics)
        for callback in run.callbacks:
            callback.on_evaluate(run, line)

    def _keep(self, run: TrainingRun, metrics: dict[str, float]) -> None:
        state, best = run.state, self.best
        if best is None or not best.better(metrics[best.metric], state.best):
            return
        state.best_step, state.best = state.step, metrics[best.metric]
        trained = run.engine.trained()
        run.on_rank0(lambda: self.kept.save(run.engine.model, trained, {}, state))

    def _forget_unneeded(self) -> None:
        needed = {state.best_step for state in self.checkpoints.steps()}
        for state in self.kept.steps():
            if state.step not in needed:
                shutil.rmtree(self.kept.path_of(state.step))


def best_adapters(folder: Path, weights: TrainedWeights) -> CheckpointStore:
    """The best adapters, which a stage keeps until it is finished."""
    return CheckpointStore(folder / "best", weights, keep=None)


def why_best_is_gone(best: CheckpointStore, state: RunState) -> str:
    """Why the best adapter that a checkpoint remembers cannot be read; empty where it can."""
    if state.best_step is None:
        return ""
    try:
        read_checkpoint(best.path_of(state.best_step))
    except Damaged as error:
        return str(error)
    return ""
