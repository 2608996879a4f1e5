"""Held-out records scored between steps with the model as it stands, and the best adapter kept."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.data.batching.packing import example_cost, plan_step
from tandem.data.batching.sampler import Step
from tandem.data.encoded.example import Example
from tandem.model.logprobs.sequence_logps import micro_batches, tokens_fed
from tandem.model.trained_weights import TrainedWeights
from tandem.storage.atomic_files import append_jsonl, atomic_write_text
from tandem.storage.hashing import Damaged
from tandem.train.checkpoint import CheckpointStore, RunState, read_checkpoint
from tandem.train.engines.engine import Engine
from tandem.train.losses.objectives import Objective
from tandem.train.step import StepRunner, StepWork, added, rank_work
from tandem.train.token_budget import TokenBudget

# Records whose sums travel at once.
_BLOCK = 1024


@dataclass(frozen=True)
class Best:
    """What makes one adapter better than another: a metric's name, and which way is up."""

    metric: str
    higher: bool

    def better(self, value: float, than: float | None) -> bool:
        """Whether a value beats another; an equal one does not."""
        return than is None or (value > than if self.higher else value < than)


class HeldOutEvaluation:
    """Scores the held-out records before the first step, on the way and at the end.

    It draws nothing at random and leaves gradients and optimizer alone, so that training goes on
    as it would have. Every line of validation.jsonl is one score.

    Args:
        engine: prepared.
        model: the adapter-wrapped model.
        trees: the held-out records.
        objective: what their loss is; examples are positions in `trees`.
        budget: tokens of a micro-batch.
        attention_weight: see `data.packing.example_cost`.
        every: steps from one score to the next.
        folder: the stage's.
        best: how the best adapter is told, when it is to be kept.
        checkpoints: the run's; a best adapter stays as long as one of them remembers it.
        show: told each score with its step.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        model: Any,
        trees: Sequence[Example],
        objective: Objective,
        budget: TokenBudget,
        attention_weight: float,
        every: int,
        folder: Path,
        best: Best | None,
        checkpoints: CheckpointStore,
        show: Callable[[int, dict[str, float]], None],
    ) -> None:
        self.engine = engine
        self.model = model
        self.trees = trees
        self.objective = objective
        self.budget = budget
        self.attention_weight = attention_weight
        self.every = every
        self.path = folder / "validation.jsonl"
        self.best = best
        self.checkpoints = checkpoints
        self.kept = best_adapters(folder, checkpoints.weights)
        self.show = show
        self._scorer = StepRunner(engine, objective, budget, seed=0, dropout=False, learns=False)

    def due(self, step: int) -> bool:
        """Whether the records are scored after that many steps."""
        return step % self.every == 0

    def begin(self, progress: RunState) -> None:
        """Forget scores beyond the step that the run goes on from; score before the first one."""
        # Scores come before the step's checkpoint, so that none is missing up to there.
        first = progress.step == 0
        self.engine.processes.on_rank0(
            lambda: forget_after(self.path, -1 if first else progress.step)
        )
        if first:
            self.score(progress, 0.0)

    def score(self, progress: RunState, epoch: float) -> None:
        """Score all held-out records and write the line; keep the adapter if it is the best yet."""
        began = time.perf_counter()
        self.model.eval()
        sums: dict[str, float] = {}
        count = 0
        for start in range(0, len(self.trees), _BLOCK):
            block = range(start, min(start + _BLOCK, len(self.trees)))
            found, denominator = self._block(progress.step, block)
            sums, count = added([sums, found]), count + denominator
        self.model.train()
        metrics = self.objective.metrics({**sums, "count": float(count)})
        seconds = time.perf_counter() - began
        progress.validation_seconds += seconds
        line = {
            "step": progress.step,
            "epoch": epoch,
            **{f"eval_{name}": value for name, value in metrics.items()},
            "eval_seconds": seconds,
        }
        self.engine.processes.on_rank0(lambda: append_jsonl(self.path, line))
        self._keep(progress, metrics)
        self.show(progress.step, line)

    def saved(self) -> None:
        """Forget best adapters that neither the run nor a checkpoint of it can come back to."""
        self.engine.processes.on_rank0(self._forget_unneeded)

    def _block(self, step: int, block: range) -> tuple[dict[str, float], int]:
        """Sums over a part of the records, and its denominator; the same in all processes."""
        engine, budget = self.engine, self.budget.tokens
        trees = [self.trees[i] for i in block]
        tokens = [tokens_fed(self.model, tree) for tree in trees]
        costs = [example_cost(tree, self.attention_weight) for tree in trees]
        plan = plan_step(
            tokens, costs, budget, engine.processes.count,
            pack_share=lambda share: micro_batches(self.model, [trees[i] for i in share], budget),
        )  # fmt: skip
        denominator = self.objective.denominator(trees)
        work = StepWork(Step(step, 0, tuple(block)), trees, tokens, denominator)
        mine = rank_work(plan, engine.processes.rank, tokens, equally_many=engine.sharded)
        parts = engine.gather(
            lambda: self._scorer.run(work, mine), lambda found: self._scorer.sums_of(work, found)
        )
        self.budget.settle([int(part.pop("budget")) for part in parts], engine.processes)
        return added(parts), denominator

    def _keep(self, progress: RunState, metrics: dict[str, float]) -> None:
        if self.best is None or not self.best.better(metrics[self.best.metric], progress.best):
            return
        progress.best_step, progress.best = progress.step, metrics[self.best.metric]
        trained = self.engine.trained()
        self.engine.processes.on_rank0(lambda: self.kept.save(self.model, trained, {}, progress))

    def _forget_unneeded(self) -> None:
        needed = {progress.best_step for progress in self.checkpoints.steps()}
        for progress in self.kept.steps():
            if progress.step not in needed:
                shutil.rmtree(self.kept.path_of(progress.step))


def best_adapters(folder: Path, weights: TrainedWeights) -> CheckpointStore:
    """Where a stage keeps the best adapters until it is finished."""
    return CheckpointStore(folder / "best", weights, keep=None)


def forget_after(path: Path, step: int) -> None:
    """Remove the lines of later steps from a file of metrics, and those that are damaged."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")[:-1]
    kept = b"".join(line + b"\n" for line in lines if _step_in(line) <= step)
    atomic_write_text(path, kept.decode())


def _step_in(line: bytes) -> float:
    """The step of a line of metrics; beyond all others where it cannot be told."""
    try:
        match json.loads(line.decode()):
            case {"step": int(step)}:
                return step
    except (ValueError, RecursionError):
        pass
    return math.inf


def why_best_is_gone(best: CheckpointStore, progress: RunState) -> str:
    """Why the best adapter that a checkpoint remembers cannot be had; empty where it can."""
    if progress.best_step is None:
        return ""
    try:
        read_checkpoint(best.path_of(progress.best_step))
    except Damaged as error:
        return str(error)
    return ""
