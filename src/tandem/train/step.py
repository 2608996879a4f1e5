"""One step of this process: its micro-batches forward and backward, finer when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from tandem.data.batching.collate import collate, record_key
from tandem.data.batching.packing import StepPlan, example_cost, plan_step
from tandem.data.batching.sampler import Step
from tandem.data.encoded.example import Example
from tandem.errors import NotFinite, TandemError
from tandem.model.logprobs.sequence_logps import micro_batches, tokens_fed
from tandem.train.engines.engine import Engine
from tandem.train.objectives.objective import Objective
from tandem.train.token_budget import Members, TokenBudget, no_room

T = TypeVar("T")


@dataclass(frozen=True)
class StepWork:
    """What a step computes."""

    step: Step  # its number, and the indices of its examples
    examples: Sequence[Example]
    tokens: Sequence[int]  # that each example feeds
    denominator: int  # what the summed loss is divided by


@dataclass(frozen=True)
class RankWork:
    """What one process computes of a step."""

    micro_batches: Sequence[Members]  # its own
    fillers: int  # how many more it runs, with a weight of 0, so that all run equally many
    smallest: int  # the example that fillers consist of


@dataclass(frozen=True)
class MicroBatchResult:
    """A micro-batch that is done: its positions in the step, and sums still on the device."""

    members: Members
    sums: dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """A step that all processes have computed: sums over all of it, and who computed what."""

    work: StepWork
    plan: StepPlan
    sums: dict[str, float]


@dataclass(frozen=True)
class StepRunner:
    """Computes any step of some examples; nothing waits for the device before its sums are read."""

    engine: Engine  # prepared
    objective: Objective
    examples: Sequence[Example]  # that steps name by index
    budget: TokenBudget  # lowered when memory runs out
    attention_weight: float  # for the balance between processes, see `packing.example_cost`
    _: KW_ONLY
    # what the objective sees of a step beforehand, by the same indices; None: the examples
    observed: Sequence[Example] | None = None
    dropout_seed: int | None = None  # of dropout masks and noise; None where there are none
    learns: bool = True  # whether there is a backward; without one, losses are only added up

    def run(self, step: Step) -> StepResult:
        """Compute a step in all processes; TandemError, with records, if a loss is not finite."""
        engine, processes = self.engine, self.engine.processes
        examples = [self.examples[i] for i in step.examples]
        denominator = self.objective.begin(examples, step.examples)
        work = self._work(step, examples, denominator)
        plan, mine = self._plan(work)
        if self.objective.couples:
            seen = work
            if self.observed is not None:
                seen = self._work(step, [self.observed[i] for i in step.examples], denominator)
            self._see_step(seen, self._plan(seen)[1])
        # Gradients are exchanged once all processes know that none has failed.
        parts = engine.gather(
            lambda: self._run(work, mine), lambda results: self._sums(work, results)
        )
        self.budget.settle([int(part.pop("budget")) for part in parts], processes)
        return StepResult(work, plan, added(parts))

    def _work(self, step: Step, examples: Sequence[Example], denominator: int) -> StepWork:
        tokens = [tokens_fed(self.engine.model, example) for example in examples]
        return StepWork(step, examples, tokens, denominator)

    def _plan(self, work: StepWork) -> tuple[StepPlan, RankWork]:
        """Who computes what of a step, and what this process does."""
        engine, model, budget = self.engine, self.engine.model, self.budget.tokens
        costs = [example_cost(example, self.attention_weight) for example in work.examples]

        def pack_share(share: Sequence[int]) -> list[Members]:
            return micro_batches(model, [work.examples[i] for i in share], budget)

        ranks, rank = engine.processes.count, engine.processes.rank
        plan = plan_step(work.tokens, costs, budget, ranks, pack_share=pack_share)
        return plan, rank_work(plan, rank, work.tokens, equally_many=engine.sharded)

    def _run(self, work: StepWork, mine: RankWork) -> list[MicroBatchResult]:
        """Compute this process's micro-batches."""
        for number in range(mine.fillers):
            last = not mine.micro_batches and number == mine.fillers - 1
            self._one(work, (mine.smallest,), 0.0, last=last)
        results = self._by_budget(
            work, mine, lambda members, last: self._one(work, members, 1.0, last=last)
        )
        return [MicroBatchResult(members, sums) for members, sums in results]

    def _by_budget(
        self, work: StepWork, mine: RankWork, compute: Callable[[Members, bool], T]
    ) -> list[tuple[Members, T]]:
        return self.budget.run(
            mine.micro_batches, work.tokens, compute,
            lambda i: no_room(work.examples[i], work.tokens[i]),
        )  # fmt: skip

    def _one(
        self, work: StepWork, members: Members, weight: float, *, last: bool
    ) -> dict[str, Tensor]:
        with nullcontext() if self.learns else torch.no_grad():
            logps, weights = self._score(work, members, weight)
            first_step = self.learns and work.step.number == 0
            result = self.objective.loss(logps, weights, members, first_step=first_step)
            loss = result.loss / work.denominator
        if self.learns:
            self.engine.backward(loss, last=last)
        return result.sums

    def _score(self, work: StepWork, members: Members, weight: float) -> tuple[Tensor, Tensor]:
        """Log-probs of a micro-batch's sequences, and their weights [S]."""
        batch = collate([work.examples[i] for i in members], self._dropout_keys(work.step, members))
        logps = self.engine.score(batch)
        weights = torch.zeros(len(logps), dtype=logps.dtype)
        weights[: batch.sequences] = weight
        return logps, weights.to(logps.device)

    def _see_step(self, work: StepWork, mine: RankWork) -> None:
        """Show the objective the log-probs of the whole step, in the order of its examples."""

        def logps(members: Members, _last: bool) -> list[list[float]]:
            with torch.no_grad():
                scored, _ = self._score(work, members, 1.0)
            values = iter(scored.tolist())
            return [[next(values) for _ in work.examples[i].branches] for i in members]

        def run() -> list[tuple[int, list[float]]]:
            for _ in range(mine.fillers):
                logps((mine.smallest,), False)
            done = self._by_budget(work, mine, logps)
            return [pair for members, rows in done for pair in zip(members, rows, strict=True)]

        parts = self.engine.gather(run, lambda rows: rows)
        rows = dict(row for part in parts for row in part)
        every = [value for i in range(len(rows)) for value in rows[i]]
        whole = torch.tensor(every, dtype=self.engine.device.sums)
        self.objective.see_step(whole.to(self.engine.device.torch_device))

    def _sums(self, work: StepWork, results: Sequence[MicroBatchResult]) -> dict[str, float]:
        """The micro-batches' sums on the host, added up, and the `budget` that is left."""
        parts: list[dict[str, float]] = []
        if results:
            names = list(results[0].sums)
            values = [one.sums[name] for one in results for name in names]
            numbers = iter(torch.stack(values).tolist())  # the step's only wait
            for one in results:
                parts.append(dict(zip(names, numbers, strict=False)))
                if not math.isfinite(parts[-1]["loss"]):
                    examples = [work.examples[i] for i in one.members]
                    raise self._not_finite(work.step.number, examples)
        return {**added(parts), "budget": self.budget.tokens}

    def _dropout_keys(self, step: Step, members: Members) -> list[int] | None:
        """The keys of some positions' dropout masks; two copies of a record have their own."""
        if self.dropout_seed is None:
            return None
        key = partial(record_key, self.dropout_seed, step.number)
        return [key(step.examples[i], step.copies[i]) for i in members]

    def _not_finite(self, step: int, examples: Sequence[Example]) -> TandemError:
        if self.learns:
            return not_finite("loss", step, examples)
        return NotFinite(
            f"the loss of held-out records is not finite after {step} steps. Records: "
            f"{_origins(examples)}. Lower the learning rate, or look at these records."
        )


def rank_work(plan: StepPlan, rank: int, tokens: Sequence[int], *, equally_many: bool) -> RankWork:
    """A rank's micro-batches; fillers where all ranks must run `equally_many`."""
    own = plan.ranks[rank]
    positions = [i for members in own for i in members] or range(len(tokens))
    smallest = min(positions, key=lambda i: (tokens[i], i))
    return RankWork(own, plan.micro_batches - len(own) if equally_many else 0, smallest)


def added(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums by name, added in the order of `parts`, so that every rank has the same."""
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def not_finite(what: str, step: int, examples: Sequence[Example]) -> TandemError:
    """The error of a step whose loss or gradient is NaN or infinite."""
    return NotFinite(
        f"the {what} of step {step + 1} is not finite; the step was not applied. Records: "
        f"{_origins(examples)}. Lower the learning rate, or look at these records."
    )


def _origins(examples: Sequence[Example]) -> str:
    more = f" and {len(examples) - 8} more" if len(examples) > 8 else ""
    return "; ".join(str(example.origin) for example in examples[:8]) + more
