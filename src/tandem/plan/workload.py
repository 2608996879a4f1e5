"""The work of a training stage: its counts, and operations (a multiply-add is two)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.data.batching.packing import pack_padded, padded_tokens, plan_step
from tandem.data.batching.sampler import StepSampler, WeightedSource
from tandem.data.encoded.dataset import EncodedDataset
from tandem.plan.model_shape import ModelShape


@dataclass(frozen=True)
class Operations:
    """What a stage computes, part by part.

    With T tokens fed, P multiplications of a token in frozen linear layers, L in the adapter, A
    visible pairs of a attention multiplications, and N trained tokens under a head of V x H:
    """

    forward: float  # 2(P + L)T + 2aA + 2NVH
    # 2PT (frozen weights have no gradient) + 4LT + 4aA + 2NVH; where all weights are trained, the
    # gradient of the head takes 2NVH more
    backward: float
    recomputed: float  # with gradient checkpointing, the layers' forward once more: 2(P + L)T + 2aA
    reference: float  # DPO's pass without the adapter over all records: 2PT + 2aA + 2NVH

    @property
    def training(self) -> float:
        """Everything but the reference pass."""
        return self.forward + self.backward + self.recomputed

    @property
    def total(self) -> float:
        """Everything."""
        return self.training + self.reference

    @property
    def reference_share(self) -> float:
        """The reference pass's share of everything."""
        return self.reference / self.total


def count_operations(
    shape: ModelShape, work: Workload, *, reference: int, checkpointing: bool, seen: bool = False
) -> Operations:
    """The operations of a stage.

    `reference` is how many passes over the records there are before training, `checkpointing`
    computes activations once more in the backward, and `seen` says that each step is computed once
    before, without gradients.
    """
    linear, adapter = 2.0 * shape.linear * work.tokens, 2.0 * shape.adapter * work.tokens
    attention = 2.0 * shape.attention * work.visible
    head = 2.0 * shape.head * work.targets
    return Operations(
        forward=(linear + adapter + attention + head) * (2 if seen else 1),
        backward=linear + 2 * adapter + 2 * attention + head * (2 if shape.full else 1),
        recomputed=linear + adapter + attention if checkpointing else 0.0,
        reference=2.0
        * reference
        * (
            (shape.linear + (shape.adapter if shape.full else 0)) * work.reference_tokens
            + shape.attention * work.reference_visible
            + shape.head * work.reference_targets
        ),
    )


# Steps that are packed at most: of more, evenly spaced ones stand for all.
_PACKED = 256


@dataclass(frozen=True)
class Workload:
    """Counts of a whole training stage, and of DPO's reference pass over the same records."""

    records: int  # trained on
    steps: int
    examples: int  # records that the steps take
    # fed, shared prefixes once
    tokens: int
    tokens_per_epoch: int
    # what padded batches would feed for the same sequences; 0 on the padded path
    padded_tokens: int
    shared_tokens: int  # what sharing prefixes saves; 0 on the padded path
    targets: int  # trained tokens that meet the output head
    visible: float  # (query, key) pairs that see each other
    longest: int  # rows of the longest record
    packed_steps: int  # the steps that the figures below are means over: all, or evenly spaced ones
    micro_batches: int  # of all steps and processes (scaled up where not all were packed)
    fill: float  # mean share of the token budget that micro-batches fill
    imbalance: float  # the costliest process's share of a step by the mean one
    largest: int  # tokens of the largest micro-batch
    # of one pass over all records
    reference_tokens: int
    reference_targets: int
    reference_visible: float


@dataclass(frozen=True)
class Pacing:
    """How a stage goes through its records."""

    # of the recipe
    batch_size: int
    epochs: float | None
    max_steps: int | None
    seed: int
    budget: int  # tokens of a micro-batch
    processes: int  # how many share a step
    attention_weight: float  # for balance, see `data.packing.example_cost`
    padded: bool = False  # whether the model reads one row a sequence, with nothing shared
    parts: tuple[WeightedSource, ...] = ()  # the weights of the records, see `StepSampler`


def count_work(dataset: EncodedDataset, pacing: Pacing) -> Workload:
    """The work of a stage over its encoded records; no tree is made for it."""
    records = _Records.of(dataset, pacing)
    sampler = StepSampler(len(dataset), pacing.batch_size, pacing.seed, pacing.parts)
    count = sampler.total_steps(pacing)
    every = max(1, math.ceil(count / _PACKED))
    times = np.zeros(len(dataset), dtype=np.int64)
    padded = 0
    packing = _Packing()
    for step in sampler.steps(0, count):
        examples = np.asarray(step.examples)
        np.add.at(times, examples, 1)  # a step may show a record twice
        if not pacing.padded:
            padded += padded_tokens(records.sequences(examples))
        if step.number % every == 0:
            packing.add(records, examples, pacing)
    return Workload(
        records=len(dataset),
        steps=count,
        examples=int(times.sum()),
        tokens=int(times @ records.fed),
        tokens_per_epoch=_an_epoch(records.fed, pacing.parts),
        padded_tokens=padded,
        shared_tokens=int(times @ records.shared),
        targets=int(times @ records.targets),
        visible=float(times @ records.visible),
        longest=int(records.fed.max()),
        packed_steps=packing.steps,
        micro_batches=round(packing.micro_batches * count / packing.steps),
        fill=packing.fill / packing.steps,
        imbalance=packing.imbalance / packing.steps,
        largest=packing.largest,
        reference_tokens=int(records.fed.sum()),
        reference_targets=int(records.targets.sum()),
        reference_visible=float(records.visible.sum()),
    )


def _an_epoch(fed: NDArray[np.int64], parts: Sequence[WeightedSource]) -> int:
    """Tokens that an epoch feeds; by weights that are fractions, epochs differ a little."""
    if not parts:
        return int(fed.sum())
    weights = np.repeat([part.weight for part in parts], [part.examples for part in parts])
    return round(float(fed @ weights))


def guess_work(records: int, tokens: int, pacing: Pacing, *, answers: float) -> Workload:
    """The work of records that nobody has seen: equally long, a share of `answers` trained."""
    sampler = StepSampler(records, pacing.batch_size)
    count, per_epoch = sampler.total_steps(pacing), sampler.steps_per_epoch()
    whole, rest = divmod(count, per_epoch)
    examples = whole * records + min(records, rest * pacing.batch_size)
    targets, visible = round(tokens * answers), tokens * (tokens + 1) / 2
    in_one = max(1, pacing.budget // tokens)
    a_share = math.ceil(min(pacing.batch_size, records) / pacing.processes)
    return Workload(
        records=records,
        steps=count,
        examples=examples,
        tokens=examples * tokens,
        tokens_per_epoch=records * tokens,
        padded_tokens=examples * tokens,
        shared_tokens=0,
        targets=examples * targets,
        visible=examples * visible,
        longest=tokens,
        packed_steps=0,
        micro_batches=count * pacing.processes * math.ceil(a_share / in_one),
        fill=min(1.0, min(in_one, a_share) * tokens / pacing.budget),
        imbalance=1.0,
        largest=min(in_one, a_share) * tokens,
        reference_tokens=records * tokens,
        reference_targets=records * targets,
        reference_visible=records * visible,
    )


@dataclass(frozen=True)
class _Records:
    """Each record's counts [n], and each sequence's length [S]."""

    fed: NDArray[np.int64]
    shared: NDArray[np.int64]
    targets: NDArray[np.int64]
    visible: NDArray[np.float64]
    costs: NDArray[np.float64]
    branches: NDArray[np.int64]
    rows: NDArray[np.int64]  # of the longest sequence, up to its last target
    lengths: NDArray[np.int64]
    first: NDArray[np.int64]

    @classmethod
    def of(cls, dataset: EncodedDataset, pacing: Pacing) -> _Records:
        """From the lengths that the encoded records keep; no tree is made for it."""
        branches = dataset.branches.astype(np.int64)
        prefix = dataset.prefix_lengths.astype(np.int64)
        lengths = dataset.sequence_lengths.astype(np.int64)
        first = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(branches)])

        def added(values: NDArray[Any]) -> NDArray[Any]:
            """Sums over each record's sequences, which has at least one."""
            return np.add.reduceat(values, first[:-1])

        own = lengths - np.repeat(prefix, branches)
        tokens = prefix + added(own)
        # Tokens after a branch's last target are not fed; assumed equally many in all branches.
        fed = dataset.fed.astype(np.int64)
        idle = np.repeat((tokens - fed) / branches, branches)
        rows = own - idle
        before = np.repeat(prefix, branches)
        seen = added(rows * before + rows * (rows + 1) / 2)
        shared = (branches - 1) * prefix
        half = prefix * prefix / 2
        cost = tokens + pacing.attention_weight * (half + added(own * before + own * own / 2))
        whole = prefix * (prefix + 1) / 2
        return cls(
            fed=fed + shared if pacing.padded else fed,
            shared=np.zeros_like(shared) if pacing.padded else shared,
            targets=added(dataset.sequence_targets.astype(np.int64)),
            visible=seen + (whole * branches if pacing.padded else whole),
            costs=cost,
            branches=branches,
            rows=np.ceil(np.maximum.reduceat(before + rows, first[:-1])).astype(np.int64),
            lengths=lengths,
            first=first,
        )

    def sequences(self, examples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Lengths of some records' sequences, record by record."""
        counts = self.branches[examples]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.lengths[np.repeat(self.first[examples], counts) + within]


@dataclass
class _Packing:
    """Sums over the steps that were packed."""

    steps: int = 0
    micro_batches: int = 0
    fill: float = 0.0
    imbalance: float = 0.0
    largest: int = 0

    def add(self, records: _Records, examples: NDArray[np.int64], pacing: Pacing) -> None:
        """Pack one step as training does."""
        tokens = records.fed[examples].tolist()
        sequences, rows = records.branches[examples].tolist(), records.rows[examples].tolist()

        def in_rows(share: Sequence[int]) -> list[tuple[int, ...]]:
            return pack_padded([(sequences[i], rows[i]) for i in share], pacing.budget)

        costs, share = records.costs[examples].tolist(), in_rows if pacing.padded else None
        plan = plan_step(tokens, costs, pacing.budget, pacing.processes, pack_share=share)
        self.steps += 1
        self.micro_batches += sum(map(len, plan.ranks))
        self.fill += plan.fill
        self.imbalance += plan.imbalance
        sizes = [sum(tokens[i] for i in members) for rank in plan.ranks for members in rank]
        self.largest = max(self.largest, *sizes)
