"""The training loop: steps of examples, micro-batches of trees, one line of metrics."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.data.batching.packing import example_cost, padded_tokens, plan_step
from tandem.data.batching.sampler import Step, StepSampler, WeightedSource
from tandem.data.encoded.example import Example
from tandem.errors import Stopped
from tandem.model.attention.select import is_padded
from tandem.model.logprobs.sequence_logps import micro_batches, tokens_fed
from tandem.storage.atomic_files import append_jsonl
from tandem.train.checkpoint import CheckpointStore, RunState
from tandem.train.engines.engine import Engine
from tandem.train.held_out_evaluation import HeldOutEvaluation, forget_after
from tandem.train.losses.objectives import Objective
from tandem.train.step import StepRunner, StepWork, added, not_finite, rank_work
from tandem.train.token_budget import TokenBudget

# Seconds within which two different signals are one request to stop.
_SAME_REQUEST = 5.0


@dataclass(frozen=True)
class Schedule:
    """When things happen, by step number, and how a step is packed.

    `attention_weight` is for balance between processes, see `packing.example_cost`; `parts` are
    the weights of the records, see `data.order.steps`.
    """

    total_steps: int
    batch_size: int
    seed: int
    attention_weight: float
    logging_steps: int
    save_steps: int
    parts: tuple[WeightedSource, ...] = ()


class Training:
    """One training run from a step to the last: the state that a loop needs a name for.

    Args:
        engine: prepared with the model and its optimizer.
        model: the adapter-wrapped model, for checkpoints.
        trees: all records.
        objective: what a step minimises.
        learning_rate: a step's rate by its number from 0.
        schedule: step counts.
        budget: tokens of a micro-batch.
        dropout: whether records need dropout keys.
        folder: the stage's folder, for metrics.jsonl.
        checkpoints: where checkpoints go.
        progress: where the run stands (a fresh one, or a checkpoint's).
        advance: told each finished step, and its metrics when it is a logged one.
        held_out: scored on the way, if there is any.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        model: Any,
        trees: Sequence[Example],
        objective: Objective,
        learning_rate: Callable[[int], float],
        schedule: Schedule,
        budget: TokenBudget,
        dropout: bool,
        folder: Path,
        checkpoints: CheckpointStore,
        progress: RunState,
        advance: Callable[[int, dict[str, float]], None],
        held_out: HeldOutEvaluation | None = None,
    ) -> None:
        self.engine = engine
        self.model = model
        self.trees = trees
        self.objective = objective
        self.learning_rate = learning_rate
        self.schedule = schedule
        self.budget = budget
        self.micro_batches = StepRunner(
            engine, objective, budget, seed=schedule.seed, dropout=dropout
        )
        self.metrics_path = folder / "metrics.jsonl"
        self.checkpoints = checkpoints
        self.progress = progress
        self.advance = advance
        self.held_out = held_out

    def run(self) -> RunState:
        """Take all remaining steps.

        Raises Stopped after a checkpoint when a process is asked to end, and TandemError before
        a step that is not finite.
        """
        schedule, progress, processes = self.schedule, self.progress, self.engine.processes
        # A killed run may have logged steps beyond its last checkpoint; they are taken again.
        processes.on_rank0(lambda: forget_after(self.metrics_path, progress.step))
        self.model.train()
        remaining = self._sampler.steps(progress.step, schedule.total_steps)
        with _stop_requests() as stop:
            if self.held_out is not None:
                self.held_out.begin(progress)
            for step in remaining:
                self._take(step)
                last = progress.step == schedule.total_steps
                if self.held_out is not None and (self.held_out.due(progress.step) or last):
                    self.held_out.score(progress, self._epoch())
                stopping = processes.any_rank(stop.requested)
                if progress.step % schedule.save_steps == 0 or last or stopping:
                    self._save()
                if stopping and not last:
                    processes.raise_on_all(
                        Stopped(
                            f"stopped after step {progress.step} of {schedule.total_steps}; a "
                            "checkpoint is written. The same command goes on from there."
                        )
                    )
        self.model.eval()
        return progress

    def _take(self, step: Step) -> None:
        began = time.perf_counter()
        trees = [self.trees[i] for i in step.examples]
        denominator = self.objective.denominator(trees)
        tokens = [tokens_fed(self.model, tree) for tree in trees]
        costs = [example_cost(tree, self.schedule.attention_weight) for tree in trees]
        engine, processes = self.engine, self.engine.processes
        budget = self.budget.tokens
        plan = plan_step(
            tokens, costs, budget, processes.count,
            pack_share=lambda share: micro_batches(self.model, [trees[i] for i in share], budget),
        )  # fmt: skip
        work = StepWork(step, trees, tokens, denominator)
        mine = rank_work(plan, processes.rank, tokens, equally_many=engine.sharded)
        # Gradients are exchanged once all processes know that none has failed.
        parts = engine.gather(
            lambda: self.micro_batches.run(work, mine),
            lambda found: self.micro_batches.sums_of(work, found),
        )
        self.budget.settle([int(part.pop("budget")) for part in parts], processes)
        sums = {"count": float(denominator), "steps": 1.0, **added(parts)}
        rate = self.learning_rate(step.number)
        norm = engine.step(rate)
        if not math.isfinite(norm):
            # The norm is of exchanged gradients, so that all ranks find the same.
            processes.raise_on_all(not_finite("gradient", step.number, trees))
        engine.device.synchronize()
        sums |= {"grad_norm": norm, "tokens": sum(tokens), "examples": len(trees)}
        sums["seconds"] = time.perf_counter() - began
        self.progress.micro_batches += sum(len(own) for own in plan.ranks)
        self.progress.fill += plan.fill
        self.progress.imbalance += plan.imbalance
        self._account(step, trees, sums, rate)

    def _save(self) -> None:
        progress = self.progress
        trained, state = self.engine.trained(), self.engine.optimizer_state()
        self.engine.processes.on_rank0(
            lambda: self.checkpoints.save(self.model, trained, state, progress)
        )
        if self.held_out is not None:
            self.held_out.saved()

    def _account(
        self, step: Step, trees: Sequence[Example], sums: dict[str, float], rate: float
    ) -> None:
        progress = self.progress
        progress.step = step.number + 1
        progress.seconds += sums["seconds"]
        progress.examples += len(trees)
        progress.tokens += int(sums["tokens"])
        if not is_padded(self.model):
            _account_savings(progress, trees)
        for name, value in sums.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        logged: dict[str, float] = {}
        last = progress.step == self.schedule.total_steps
        if progress.step % self.schedule.logging_steps == 0 or last:
            memory = max(self.engine.processes.gather(self.engine.device.peak_memory))
            logged = {**self._metrics(rate), "memory_bytes": memory}
            self.engine.processes.on_rank0(lambda: append_jsonl(self.metrics_path, logged))
            progress.sums = {}
        self.advance(progress.step, logged)

    def _metrics(self, rate: float) -> dict[str, float]:
        sums = self.progress.sums
        return {
            "step": self.progress.step,
            "epoch": self._epoch(),
            **self.objective.metrics(sums),
            "grad_norm": sums["grad_norm"] / sums["steps"],
            "learning_rate": rate,
            "step_seconds": sums["seconds"] / sums["steps"],
            "tokens": sums["tokens"],
            "examples": sums["examples"],
            "tokens_per_second": sums["tokens"] / sums["seconds"],
        }

    def _epoch(self) -> float:
        return round(self._sampler.epochs_after(self.progress.step), 4)

    @property
    def _sampler(self) -> StepSampler:
        schedule = self.schedule
        return StepSampler(len(self.trees), schedule.batch_size, schedule.seed, schedule.parts)


def _sequence_length(tree: Example, branch: int) -> int:
    return len(tree.prefix.input_ids) + len(tree.branches[branch].input_ids)


def _account_savings(progress: RunState, trees: Sequence[Example]) -> None:
    lengths = [_sequence_length(tree, b) for tree in trees for b in range(len(tree.branches))]
    progress.padded_tokens += padded_tokens(lengths)
    # What every branch after a tree's first would have fed again.
    progress.shared_tokens += sum(
        (len(tree.branches) - 1) * len(tree.prefix.input_ids) for tree in trees
    )


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
