"""A step's micro-batches in this process: forward and backward, finer when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.data.batching.collate import collate, record_key
from tandem.data.batching.packing import StepPlan
from tandem.data.batching.sampler import Step
from tandem.data.encoded.example import Example
from tandem.errors import TandemError
from tandem.train.engines.engine import Engine
from tandem.train.losses.objectives import Objective
from tandem.train.token_budget import Members, TokenBudget, no_room


@dataclass(frozen=True)
class StepWork:
    """What a step computes.

    Attributes:
        step: its number and examples.
        trees, tokens: of each example, the tokens that it feeds.
        denominator: what the summed loss is divided by.
    """

    step: Step
    trees: Sequence[Example]
    tokens: Sequence[int]
    denominator: int


@dataclass(frozen=True)
class RankWork:
    """What one process computes of a step.

    Attributes:
        pieces: its micro-batches.
        fillers: so many more, of the `smallest` tree, that count nothing, to keep others company.
    """

    pieces: Sequence[Members]
    fillers: int
    smallest: int


@dataclass(frozen=True)
class MicroBatchResult:
    """A micro-batch that is done: its positions in the step, and sums still on the device."""

    members: Members
    sums: dict[str, Tensor]


class StepRunner:
    """Computes micro-batches of any step; nothing waits for the device before `sums_of`.

    Args:
        engine: prepared.
        objective: what a step minimises.
        budget: lowered when memory runs out.
        seed: of dropout masks.
        dropout: whether records need keys for them.
        learns: whether there is a backward; without one, losses are only added up.
    """

    def __init__(
        self,
        engine: Engine,
        objective: Objective,
        budget: TokenBudget,
        *,
        seed: int,
        dropout: bool,
        learns: bool = True,
    ) -> None:
        self.engine = engine
        self.objective = objective
        self.budget = budget
        self.seed = seed
        self.dropout = dropout
        self.learns = learns

    def run(self, work: StepWork, own: RankWork) -> list[MicroBatchResult]:
        """Forward, and backward, of this process's micro-batches; see `TokenBudget.run`."""
        for number in range(own.fillers):
            last = not own.pieces and number == own.fillers - 1
            self._one(work, (own.smallest,), 0.0, last=last)
        found = self.budget.run(
            own.pieces,
            work.tokens,
            lambda members, last: self._one(work, members, 1.0, last=last),
            lambda i: no_room(work.trees[i], work.tokens[i]),
        )
        return [MicroBatchResult(members, sums) for members, sums in found]

    def sums_of(self, work: StepWork, found: Sequence[MicroBatchResult]) -> dict[str, float]:
        """The micro-batches' sums on the host, added up, and the `budget` that is left.

        Raises TandemError naming the records of a loss that is not finite.
        """
        sums: dict[str, float] = {}
        if found:
            names = list(found[0].sums)
            values = [one.sums[name] for one in found for name in names]
            numbers = iter(torch.stack(values).tolist())  # the step's only wait
            for one in found:
                parts = dict(zip(names, numbers, strict=False))
                if not math.isfinite(parts["loss"]):
                    trees = [work.trees[i] for i in one.members]
                    raise self._not_finite(work.step.number, trees)
                for name, value in parts.items():
                    sums[name] = sums.get(name, 0.0) + value
        return {**sums, "budget": self.budget.tokens}

    def _one(
        self, work: StepWork, members: Members, weight: float, *, last: bool
    ) -> dict[str, Tensor]:
        trees = [work.trees[i] for i in members]
        examples = [work.step.examples[i] for i in members]
        number = work.step.number
        keys = self._keys(work.step, members) if self.dropout else None
        with nullcontext() if self.learns else torch.no_grad():
            logps = self.engine.score(collate(trees, keys))
            part = self.objective.part(logps, examples, first_step=self.learns and number == 0)
            loss = part.loss / work.denominator
        if self.learns:
            self.engine.backward(loss * weight if weight != 1.0 else loss, last=last)
        return part.sums

    def _keys(self, step: Step, members: Members) -> list[int]:
        """The keys of some positions' dropout masks; two copies of a record have their own."""
        copies = step.copies
        return [record_key(self.seed, step.number, step.examples[i], copies[i]) for i in members]

    def _not_finite(self, step: int, trees: Sequence[Example]) -> TandemError:
        if self.learns:
            return not_finite("loss", step, trees)
        return TandemError(
            f"the loss of held-out records is not finite after {step} steps. Records: "
            f"{_origins(trees)}. Lower the learning rate, or look at these records."
        )


def rank_work(plan: StepPlan, rank: int, tokens: Sequence[int], *, equally_many: bool) -> RankWork:
    """A rank's micro-batches; fillers where all ranks must run `equally_many`."""
    pieces = plan.ranks[rank]
    trees = [i for members in pieces for i in members] or range(len(tokens))
    smallest = min(trees, key=lambda i: (tokens[i], i))
    return RankWork(pieces, plan.micro_batches - len(pieces) if equally_many else 0, smallest)


def added(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums over ranks, in the order of ranks, so that every rank has the same."""
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def not_finite(what: str, step: int, trees: Sequence[Example]) -> TandemError:
    """The error of a step whose loss or gradient is no number, or beyond all bounds."""
    return TandemError(
        f"the {what} of step {step + 1} is not finite; the step was not applied. Records: "
        f"{_origins(trees)}. Lower the learning rate, or look at these records."
    )


def _origins(trees: Sequence[Example]) -> str:
    more = f" and {len(trees) - 8} more" if len(trees) > 8 else ""
    return "; ".join(str(tree.origin) for tree in trees[:8]) + more
