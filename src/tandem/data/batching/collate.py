"""Make the tensors of one micro-batch from examples: one row of T tokens with all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.data.encoded.example import Branch, Example, TokenIds

# Knuth's and splitmix64's odd constants; any good 64-bit mixer would do.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class Segment:
    """Consecutive rows that attend causally to themselves and wholly to a prefix before them.

    Rows `start` to `stop` - 1 see rows `prefix_start` to `prefix_stop` - 1 (none when equal), whose
    positions they continue.
    """

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward pass.

    tokens     P0 P1 P2 | C0 C1 | R0         a pair's last tokens predict nothing and are not fed
    positions   0  1  2 |  3  4 |  3
    segments   [0, 5)             [5, 6) after prefix [0, 3)
    targets    C0 and R0 from row 2, C1 from row 3, ...

    Attributes:
        input_ids, position_ids: [T] int64.
        segments: cover the T rows in order, each row once.
        target_row, target_id, target_sequence: [N] int64; the hidden state that predicts, the
            token predicted, and the sequence whose log-probability it belongs to.
        read_rows: [R] int64; the rows that predict anything, each once, ascending.
        sequences: S, the number of sequences; an example's branches follow each other.
        sequence_tokens: trained tokens of each sequence [S].
        dropout_keys: [T] int64, distinct for every (seed, step, record, token), or None.
        target_weight: [N] float32, what each target's log-prob counts, or None: each counts once.
        record_tokens: [T] int64; the tokens that a row's record feeds, where there are keys.
        spans: `row_spans` of the segments, in a micro-batch that was padded to a declared shape.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[Segment, ...]
    target_row: Tensor
    target_id: Tensor
    target_sequence: Tensor
    read_rows: Tensor
    sequences: int
    sequence_tokens: tuple[int, ...]
    dropout_keys: Tensor | None = None
    record_tokens: Tensor | None = None
    spans: Tensor | None = None
    target_weight: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens fed, shared prefixes counted once."""
        return int(self.input_ids.shape[0])

    def to(self, device: torch.device) -> MicroBatch:
        """Return the same micro-batch with its tensors on `device`."""
        if self.input_ids.device == device:
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def padded_shape(example: Example) -> tuple[int, int]:
    """Return an example's sequences and the tokens of its longest, up to the last target."""
    prefix = len(example.prefix.input_ids)
    return len(example.branches), prefix + max(branch.fed for branch in example.branches)


def collate(examples: Sequence[Example], dropout_keys: Sequence[int] | None = None) -> MicroBatch:
    """Lay out examples one after the other; each has a `record_key` if dropout masks are drawn."""
    parts = _Parts([], [], [], [], [], [], [], [], [])
    for index, example in enumerate(examples):
        parts.add(example, None if dropout_keys is None else dropout_keys[index])
    return MicroBatch(
        input_ids=_tensor(parts.ids),
        position_ids=_tensor(parts.positions),
        segments=tuple(parts.segments),
        target_row=_tensor(parts.target_rows),
        target_id=_tensor(parts.target_ids),
        target_sequence=torch.repeat_interleave(
            torch.arange(len(parts.sequence_tokens)), torch.tensor(parts.sequence_tokens)
        ),
        read_rows=torch.from_numpy(np.unique(np.concatenate(parts.target_rows))),
        sequences=len(parts.sequence_tokens),
        sequence_tokens=tuple(parts.sequence_tokens),
        dropout_keys=_tensor(parts.keys) if dropout_keys is not None else None,
        target_weight=torch.from_numpy(np.concatenate(parts.weights)) if parts.weights else None,
        record_tokens=(
            _tensor([np.repeat(parts.rows, parts.rows)]) if dropout_keys is not None else None
        ),
    )


def row_spans(segments: Sequence[Segment]) -> Tensor:
    """Return [3, T] int64: where each row's segment starts, and where its prefix starts and stops.

    Row i sees rows j with start <= j <= i, and those of the prefix, so that two comparisons make
    the mask on any device.
    """
    spans = [(s.start, s.prefix_start, s.prefix_stop) for s in segments]
    lengths = torch.tensor([s.stop - s.start for s in segments])
    return torch.tensor(spans, dtype=torch.int64).T.repeat_interleave(lengths, dim=1)


def record_key(seed: int, step: int, example: int, copy: int = 0) -> int:
    """Return 64 bits for one record in one step, from which its dropout masks are drawn.

    `copy` counts from 0 where a step has the same record several times.
    """
    key = np.zeros(1, dtype=np.uint64)
    for part in (seed, step, example, copy) if copy else (seed, step, example):
        key = _mix(key ^ np.uint64(part))
    return int(key[0])


@dataclass(frozen=True)
class _Parts:
    ids: list[TokenIds]
    positions: list[np.ndarray]
    keys: list[np.ndarray]
    segments: list[Segment]
    target_rows: list[np.ndarray]
    target_ids: list[TokenIds]
    weights: list[NDArray[np.float32]]  # empty where no target has any
    sequence_tokens: list[int]
    rows: list[int]  # of each example

    def add(self, example: Example, key: int | None) -> None:
        """Lay out an example behind the others; `key` is its `record_key`, if there is dropout."""
        start = sum(self.rows)
        row = start
        prefix = len(example.prefix.input_ids)
        self.ids.append(example.prefix.input_ids)
        self.positions.append(np.arange(prefix))
        row += prefix
        for number, branch in enumerate(example.branches):
            fed = branch.fed
            self.ids.append(branch.input_ids[:fed])
            self.positions.append(np.arange(prefix, prefix + fed))
            # The first branch follows its prefix directly: together they are one causal run.
            if number == 0 and prefix + fed:
                self.segments.append(Segment(start, row + fed))
            elif fed:
                self.segments.append(Segment(row, row + fed, start, start + prefix))
            self._add_targets(example, branch, start, row)
            row += fed
        if key is not None:
            counters = np.arange(1, example.fed + 1, dtype=np.uint64) * _GOLDEN
            self.keys.append(_mix(np.uint64(key) + counters).view(np.int64))
        self.rows.append(row - start)

    def _add_targets(self, example: Example, branch: Branch, start: int, branch_row: int) -> None:
        prefix = len(example.prefix.input_ids)
        in_prefix = np.flatnonzero(example.prefix.trained)
        in_branch = np.flatnonzero(branch.trained)
        predicting = branch_row + in_branch - 1
        predicting[in_branch == 0] = start + prefix - 1
        self.target_rows.extend([start + in_prefix - 1, predicting])
        self.target_ids.extend([example.prefix.input_ids[in_prefix], branch.input_ids[in_branch]])
        if example.prefix.weights is not None and branch.weights is not None:
            self.weights.extend([example.prefix.weights[in_prefix], branch.weights[in_branch]])
        self.sequence_tokens.append(len(in_prefix) + len(in_branch))


def _mix(value: np.ndarray) -> np.ndarray:
    """Apply the finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * _MIX_1
        value = (value ^ (value >> np.uint64(27))) * _MIX_2
        return np.asarray(value ^ (value >> np.uint64(31)))


def _tensor(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
