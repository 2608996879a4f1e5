"""Micro-batches as padded rows, one sequence each, for models that cannot read packed trees."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem.data.collate import MicroBatch, Segment


@dataclass(frozen=True)
class PaddedRows:
    """A micro-batch's sequences side by side.

    tokens     P0 P1 P2 | C0 C1 | R0        rows     P0 P1 P2 C0 C1
                                                     P0 P1 P2 R0  .

    Attributes:
        rows: [S, L] int64; which row of the micro-batch each place shows, row 0 where a sequence
            has ended already.
        target_sequence, target_position: [N] int64; the place that predicts each target.
        tokens: places that are no padding.
    """

    rows: Tensor
    target_sequence: Tensor
    target_position: Tensor
    tokens: int


def padded_rows(batch: MicroBatch) -> PaddedRows:
    """Undo sharing and packing: each sequence from its root to the row of its last target.

    Padding stands on the right, after everything that is read, so a causal model needs no mask
    for it, whatever it carries along from token to token.
    """
    last = _last_rows(batch)
    ends = [row for row in last if row >= 0]  # a sequence without targets needs no place
    paths = [_path(batch.segments, row) for row in ends]
    lengths = [len(path) for path in paths]
    rows = torch.zeros(len(paths), max(lengths), dtype=torch.int64)
    for place, path in enumerate(paths):
        rows[place, : len(path)] = path
    number = torch.tensor([row >= 0 for row in last]).cumsum(0) - 1
    device = batch.input_ids.device
    return PaddedRows(
        rows=rows.to(device),
        target_sequence=number.to(device)[batch.target_sequence],
        target_position=batch.position_ids[batch.target_row],
        tokens=sum(lengths),
    )


def padded_hidden(decoder: Any, batch: MicroBatch, padded: PaddedRows) -> Tensor:
    """The hidden states that predict the micro-batch's targets, in their order [N, H].

    Args:
        decoder: maps ids to hidden states under its own causal attention or recurrence.
        batch: the micro-batch.
        padded: its sequences side by side.
    """
    hidden: Tensor = decoder(
        input_ids=batch.input_ids[padded.rows], use_cache=False
    ).last_hidden_state  # [S, L, H]
    return hidden[padded.target_sequence, padded.target_position]


def _last_rows(batch: MicroBatch) -> list[int]:
    """The row that predicts each sequence's last target, -1 for a sequence without any."""
    last = torch.full((batch.sequences,), -1, device=batch.target_row.device)
    last = last.scatter_reduce(0, batch.target_sequence, batch.target_row, "amax")
    return [int(row) for row in last.tolist()]


def _path(segments: tuple[Segment, ...], row: int) -> Tensor:
    """The rows from a tree's root to `row`, in the order of their positions."""
    starts = [segment.start for segment in segments]
    parts: list[Tensor] = []
    while True:
        segment = segments[bisect_right(starts, row) - 1]
        parts.append(torch.arange(segment.start, row + 1))
        if segment.prefix_stop == segment.prefix_start:
            return torch.cat(parts[::-1])
        row = segment.prefix_stop - 1
