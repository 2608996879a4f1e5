"""The training loop: steps of examples, and callbacks between them."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tandem.data.batching.packing import padded_tokens
from tandem.data.batching.sampler import Step
from tandem.errors import Stopped, UserError
from tandem.model.attention.select import is_padded
from tandem.train.callbacks.callback import StepReport, TrainingRun
from tandem.train.checkpoint import RunState
from tandem.train.step import StepResult, StepRunner, not_finite

# Two different signals within so many seconds are one request to stop.
_SAME_REQUEST = 5.0
# Sums that the loop adds to the objective's.
_OWN_SUMS = ("steps", "grad_norm", "tokens", "examples", "seconds")


@dataclass(frozen=True)
class Trainer:
    """Takes the steps of a run, whose engine is prepared with the model and its optimizer."""

    training: TrainingRun
    runner: StepRunner
    learning_rate: Callable[[int], float]  # a step's rate by its number from 0

    def run(self) -> None:
        """Take all remaining steps, or those until a callback finishes the run.

        Raises Stopped after a checkpoint when a process, or a callback, is asked to end, UserError
        where a callback of the user's own fails, and TandemError before a step that is not finite.
        """
        run, model = self.training, self.training.engine.model
        model.train()
        with _stop_requests() as stop:
            for callback in run.callbacks:
                callback.on_train_begin(run)
            end = run.state.step if run.finish_reason else run.total_steps
            for step in run.sampler.steps(run.state.step, end):
                report = self._take(step)
                for callback in run.callbacks:
                    callback.on_step_end(run, report)
                if run.finish_reason and not report.metrics:
                    self._log_early(step)
                self._end_step(stop.requested, last=report.last or bool(run.finish_reason))
                if run.finish_reason:
                    break
        model.eval()

    def _log_early(self, step: Step) -> None:
        """Give the callbacks the line of metrics of a last step that was not known to be it."""
        run = self.training
        report = StepReport(self._metrics(self.learning_rate(step.number)), last=True)
        run.state.sums = {}
        for callback in run.callbacks:
            callback.on_early_end(run, report)

    def _end_step(self, requested: bool, *, last: bool) -> None:
        """Call the callbacks' `before_next_step`; raise Stopped where the run ends here."""
        run, processes = self.training, self.training.engine.processes
        run.stopping = processes.any_rank(requested or bool(run.stop_reason or run.failure))
        for callback in run.callbacks:
            callback.before_next_step(run)
        if run.failure:
            processes.raise_on_all(
                UserError(
                    f"{run.failure}. A checkpoint of step {run.state.step} of {run.total_steps} is "
                    "written. Mend it, and the same command resumes from there"
                )
            )
        if run.stopping and not last:
            why = f": {run.stop_reason}" if run.stop_reason else ""
            processes.raise_on_all(
                Stopped(
                    f"stopped after step {run.state.step} of {run.total_steps}{why}; a "
                    "checkpoint is written. The same command resumes from it."
                )
            )

    def _take(self, step: Step) -> StepReport:
        engine, state = self.training.engine, self.training.state
        began = time.perf_counter()
        result = self.runner.run(step)
        work = result.work
        rate = self.learning_rate(step.number)
        norm = engine.step(rate)
        if not math.isfinite(norm):
            # The norm is of exchanged gradients, so that all ranks find the same.
            engine.processes.raise_on_all(not_finite("gradient", step.number, work.examples))
        engine.device.synchronize()
        sums = {
            "count": float(work.denominator),
            "steps": 1.0,
            **result.sums,
            "grad_norm": norm,
            "tokens": float(sum(work.tokens)),
            "examples": float(len(work.examples)),
            "seconds": time.perf_counter() - began,
        }
        _account(state, result, sums["seconds"], padded=is_padded(engine.model))
        for name, value in sums.items():
            state.sums[name] = state.sums.get(name, 0.0) + value
        last = state.step == self.training.total_steps
        if not last and state.step % self.training.job.settings.logging_steps:
            return StepReport({}, last)
        metrics = self._metrics(rate)
        state.sums = {}
        return StepReport(metrics, last)

    def _metrics(self, rate: float) -> dict[str, float]:
        """A line of metrics.jsonl over the steps since the last one."""
        run, sums = self.training, self.training.state.sums
        of_objective = {name: value for name, value in sums.items() if name not in _OWN_SUMS}
        return {
            "step": run.state.step,
            "epoch": run.epoch,
            **self.runner.objective.metrics(of_objective),
            "grad_norm": sums["grad_norm"] / sums["steps"],
            "learning_rate": rate,
            "step_seconds": sums["seconds"] / sums["steps"],
            "tokens": sums["tokens"],
            "examples": sums["examples"],
            "tokens_per_second": sums["tokens"] / sums["seconds"],
            "memory_bytes": max(run.engine.processes.gather(run.engine.device.peak_memory)),
        }


def _account(state: RunState, result: StepResult, seconds: float, *, padded: bool) -> None:
    """Count a finished step."""
    work, plan = result.work, result.plan
    state.step = work.step.number + 1
    state.seconds += seconds
    state.examples += len(work.examples)
    state.tokens += sum(work.tokens)
    state.micro_batches += sum(len(own) for own in plan.ranks)
    state.fill += plan.fill
    state.imbalance += plan.imbalance
    if padded:
        return
    lengths = []
    for example in work.examples:
        prefix = len(example.prefix.input_ids)
        lengths += [prefix + len(branch.input_ids) for branch in example.branches]
        # Tokens that every branch after the first would have fed again.
        state.shared_tokens += (len(example.branches) - 1) * prefix
    state.padded_tokens += padded_tokens(lengths)


@dataclass
class _StopRequest:
    requested: bool = False
    number: int = 0
    at: float = 0.0


@contextmanager
def _stop_requests() -> Iterator[_StopRequest]:
    """SIGINT and SIGTERM ask for an end after the current step; a second one interrupts at once.

    A SIGTERM right after a SIGINT counts as the same request: so DeepSpeed's launcher passes on a
    Ctrl-C.
    """
    request = _StopRequest()

    def ask(number: int, _frame: Any) -> None:
        now = time.monotonic()
        if request.requested and (number == request.number or now - request.at > _SAME_REQUEST):
            raise KeyboardInterrupt
        request.requested, request.number, request.at = True, number, now

    try:
        previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals cannot be handled
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
