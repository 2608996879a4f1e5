"""Micro-batches in declared shapes, for devices that compile a graph for every shape they meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.data.batching.collate import MicroBatch, Segment, row_spans
from tandem.data.batching.packing import pack
from tandem.data.encoded.dataset import EncodedDataset
from tandem.errors import UserError
from tandem.runtime.device import BatchRequest

# Automatic lengths are multiples of this, which suits matrix engines.
_GRAIN = 128
# `auto` makes so many lengths, each half of the next; each has graphs to compile.
_AUTO = 4
# Targets and sequences are rounded up to multiples of this.
_ALIGNED = 8


@dataclass(frozen=True)
class Bucket:
    """One declared shape: rows T, targets N and sequences S of a filled micro-batch."""

    rows: int
    targets: int
    sequences: int


@dataclass(frozen=True)
class Buckets:
    """All declared shapes of a run; the densest records decide targets and sequences of T rows."""

    shapes: tuple[Bucket, ...]

    @property
    def longest(self) -> int:
        """Rows of the largest shape, which no micro-batch may exceed."""
        return self.shapes[-1].rows

    def fill(self, batch: MicroBatch) -> MicroBatch:
        """The same micro-batch in the smallest shape that holds it."""
        return fill_up(batch, self.bucket_for(batch))

    def bucket_for(self, batch: MicroBatch) -> Bucket:
        """The smallest shape that holds a micro-batch."""
        for shape in self.shapes:
            if shape.rows >= batch.tokens:
                return shape
        raise ValueError(f"{batch.tokens} rows in one micro-batch, but at most {self.longest} fit")


def declare_buckets(
    asked: Sequence[int] | Literal["auto", "max"],
    dataset: EncodedDataset,
    *,
    budget: int,
    max_length: int,
    held_out: EncodedDataset | None = None,
) -> Buckets:
    """The shapes of a run over these records.

    Args:
        asked: lengths in tokens; `max`: one, which holds `max_length` and the longest record;
            `auto`: up to four, the largest of which holds the token budget and the longest record,
            each other half of the next, so that filling a micro-batch up never doubles it.

    Raises UserError, with the record and the lengths, when a record exceeds the largest length.
    """
    everything = [dataset] if held_out is None else [dataset, held_out]
    longest = max((some[int(some.fed.argmax())] for some in everything), key=lambda tree: tree.fed)
    most = longest.fed
    if asked == "auto":
        lengths = _halves(max(budget, most))
    elif asked == "max":
        lengths = (_grained(max(max_length, most)),)
    else:
        lengths = tuple(sorted(set(asked)))
        if most > lengths[-1]:
            raise UserError(
                f"hpu.buckets: {longest.origin} feeds {most} tokens at once, and the "
                f"lengths are {', '.join(map(str, lengths))}. Add a length of at least {most}, or "
                "lower max_length."
            )
    fed, branches, targets_of = (
        np.concatenate([getattr(some, name) for some in everything])
        for name in ("fed", "branches", "sequence_targets")
    )
    first = np.concatenate([[0], np.cumsum(branches[:-1], dtype=np.int64)])
    targets, sequences = _densest(np.add.reduceat(targets_of, first), fed), _densest(branches, fed)
    grain = math.lcm(_ALIGNED, int(branches.max()))
    return Buckets(
        tuple(
            Bucket(
                rows,
                _aligned(math.ceil(targets * rows), _ALIGNED),
                _aligned(math.ceil(sequences * rows), grain),
            )
            for rows in lengths
        )
    )


def fill_up(batch: MicroBatch, bucket: Bucket) -> MicroBatch:
    """The same micro-batch in a declared shape, on the CPU; no result depends on the filling.

    A filler row sees itself alone and nothing reads it. Filler targets are summed into a slot
    behind the last sequence, which is thrown away; filler sequences have no targets, and a log-prob
    of 0. The result has `spans` in place of a mask, and every row in `read_rows`, whose real number
    would be one more shape.
    """
    rows = bucket.rows - batch.tokens
    targets = bucket.targets - len(batch.target_id)
    sequences = bucket.sequences - batch.sequences
    if min(rows, targets, sequences) < 0:
        raise ValueError(f"{batch.tokens} rows, {len(batch.target_id)} targets and "
                         f"{batch.sequences} sequences do not fit into {bucket}")  # fmt: skip
    alone = tuple(Segment(row, row + 1) for row in range(batch.tokens, bucket.rows))
    segments = (*batch.segments, *alone)
    keys, tokens = batch.dropout_keys, batch.record_tokens
    return replace(
        batch,
        input_ids=_filled(batch.input_ids, rows, 0),
        position_ids=_filled(batch.position_ids, rows, 0),
        segments=segments,
        target_row=_filled(batch.target_row, targets, 0),
        target_id=_filled(batch.target_id, targets, 0),
        target_weight=None
        if batch.target_weight is None
        else _filled(batch.target_weight, targets, 0),
        target_sequence=_filled(batch.target_sequence, targets, bucket.sequences),
        read_rows=torch.arange(bucket.rows),
        sequences=bucket.sequences,
        sequence_tokens=(*batch.sequence_tokens, *[0] * sequences),
        dropout_keys=None if keys is None else _filled(keys, rows, 0),
        record_tokens=None if tokens is None else _filled(tokens, rows, 1),
        spans=row_spans(segments),
    )


def padding_share(rows: Sequence[int], buckets: Buckets) -> float:
    """The share of the rows fed that is padding, for micro-batches of these many real rows."""
    lengths = [shape.rows for shape in buckets.shapes]
    fed = sum(next(length for length in lengths if length >= real) for real in rows)
    return 1 - sum(rows) / fed if fed else 0.0


def _halves(tokens: int) -> tuple[int, ...]:
    lengths = [_grained(tokens)]
    while len(lengths) < _AUTO and lengths[0] > _GRAIN:
        lengths.insert(0, _grained(lengths[0] / 2))
    return tuple(lengths)


def _grained(tokens: float) -> int:
    return _aligned(math.ceil(tokens), _GRAIN)


def _aligned(count: int, grain: int) -> int:
    return -(-count // grain) * grain


def _densest(counts: NDArray[np.int32], fed: NDArray[np.int32]) -> float:
    """The most of something that a row of any record stands for."""
    return float((counts / np.maximum(fed, 1)).max())


def _filled(tensor: Tensor, count: int, value: int) -> Tensor:
    return torch.cat([tensor, tensor.new_full((count,), value)])


def declared_shapes(
    asked: Sequence[int] | Literal["auto", "max"], request: BatchRequest
) -> tuple[Buckets, int]:
    """Return the shapes that micro-batches, also held-out ones, are padded to, and the budget.

    The budget never exceeds the largest shape; where lengths were declared and no budget, it is the
    largest, since a smaller one would be padded anyway. A line on the console says what filling
    up costs in an epoch, as one process packs it.

    Raises UserError for a record, or a budget, that exceeds the declared lengths.
    """
    budget = request.budget
    buckets = declare_buckets(
        asked, request.data,
        budget=budget, max_length=request.max_length, held_out=request.held_out,
    )  # fmt: skip
    if asked != "auto":
        budget = _within(buckets.longest, request.requested)
    name = "pad_max" if asked == "max" else "buckets"
    fed = request.data.fed.tolist()
    rows = [
        sum(fed[step.examples[i]] for i in members)
        for step in request.sampler.steps(0, request.sampler.steps_per_epoch())
        for members in pack([fed[i] for i in step.examples], budget)
    ]
    share = padding_share(rows, buckets)
    lengths = ", ".join(str(shape.rows) for shape in buckets.shapes)
    request.log(
        f"{name}: {share:.0%} of the tokens fed are padding (micro-batches of {lengths} tokens)"
    )
    return buckets, budget


def _within(longest: int, requested: int | Literal["auto"]) -> int:
    if requested == "auto":
        return longest
    if requested > longest:
        raise UserError(
            f"tokens_per_microbatch {requested} exceeds the largest of hpu.buckets, {longest}. "
            "Lower the one or raise the other."
        )
    return requested
