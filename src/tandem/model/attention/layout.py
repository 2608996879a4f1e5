"""How rows of a micro-batch see each other, carried from the collator to the attention layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from tandem.data.batching.collate import Segment, row_spans

# The keyword under which the layout travels through a transformers model's forward.
LAYOUT_KEYWORD = "tandem_layout"


@dataclass(frozen=True)
class KeyPaths:
    """Keys by path: for each segment, its prefix's rows and its own."""

    rows: Tensor  # [K] int64; the row of the micro-batch at each of the K places
    own: Tensor  # [T] int64; the place where a row stands in its own segment's path
    # where prefixes stand in the paths of other segments: (rows, places), both [R] int64, so that
    # no row occurs twice in one pair
    shared: tuple[tuple[Tensor, Tensor], ...]
    # [segments + 1] int32; where segments and paths begin
    query_starts: Tensor
    key_starts: Tensor
    # in tokens
    longest_query: int
    longest_path: int


@dataclass(frozen=True)
class TreeLayout:
    """The segments of a micro-batch and, for masks, its position ids [T].

    `spans` are there in micro-batches of a declared shape, whose masks are all made by the same
    operations. Masks, tables and key paths are made once and kept for the other layers.
    """

    segments: tuple[Segment, ...]
    position_ids: Tensor
    spans: Tensor | None = None
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _biases: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def longest_path(self) -> int:
        """The longest sequence of the micro-batch in tokens."""
        return max(s.stop - s.start + s.prefix_stop - s.prefix_start for s in self.segments)

    def mask(self, window: int | None) -> Tensor:
        """[T, T] bool: which keys (columns) a query (row) sees; windows count path positions."""
        # In a declared shape, only the shape decides, not the micro-batch's contents.
        longest = self.longest_path() if self.spans is None else self.position_ids.shape[0]
        if window is not None and window >= longest:
            window = None
        if window not in self._masks:
            self._masks[window] = self._build(window)
        return self._masks[window]

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[1, 1, T, T] in `dtype`: what to add to scores, 0 or the least number there is."""
        if (window, dtype) not in self._biases:
            mask = self.mask(window)[None, None]
            zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            least = torch.finfo(dtype).min
            self._biases[window, dtype] = zeros.masked_fill(~mask, least)
        return self._biases[window, dtype]

    @cached_property
    def table(self) -> tuple[Tensor, Tensor]:
        """The segments as numbers, for kernels: [n, 4] int64, and where each tree begins [t + 1].

        A tree is a segment without a prefix and those after it whose prefix lies in it.
        """
        rows = [(s.start, s.stop, s.prefix_start, s.prefix_stop) for s in self.segments]
        roots = [i for i, (_, _, start, stop) in enumerate(rows) if start == stop]
        return torch.tensor(rows, dtype=torch.int64), torch.tensor([*roots, len(rows)])

    @cached_property
    def key_paths(self) -> KeyPaths:
        """Where each segment finds its keys, on the micro-batch's device."""
        return _key_paths(self.segments, self.position_ids.device)

    def _build(self, window: int | None) -> Tensor:
        device = self.position_ids.device
        spans = row_spans(self.segments).to(device) if self.spans is None else self.spans
        start, prefix_start, prefix_stop = spans[:, :, None]  # each [T, 1]
        rows = torch.arange(self.position_ids.shape[0], device=device)
        visible = (rows >= start) & (rows <= rows[:, None])
        visible |= (rows >= prefix_start) & (rows < prefix_stop)
        if window is not None:
            distance = self.position_ids[:, None] - self.position_ids[None, :]
            visible &= distance < window
        return visible


def _key_paths(segments: tuple[Segment, ...], device: torch.device) -> KeyPaths:
    rows, own = [], []
    queries, keys = [0], [0]
    # Prefixes in rounds: within one, no row occurs twice.
    rounds: list[list[tuple[Segment, int]]] = []
    for segment in segments:
        place = keys[-1]
        prefix = segment.prefix_stop - segment.prefix_start
        length = segment.stop - segment.start
        if prefix:
            rows.append(torch.arange(segment.prefix_start, segment.prefix_stop))
            _add_to_a_round(rounds, segment, place)
        rows.append(torch.arange(segment.start, segment.stop))
        own.append(torch.arange(place + prefix, place + prefix + length))
        queries.append(segment.stop)
        keys.append(place + prefix + length)
    return KeyPaths(
        rows=torch.cat(rows).to(device),
        own=torch.cat(own).to(device),
        shared=tuple(_round(members, device) for members in rounds),
        query_starts=torch.tensor(queries, dtype=torch.int32, device=device),
        key_starts=torch.tensor(keys, dtype=torch.int32, device=device),
        longest_query=max(s.stop - s.start for s in segments),
        longest_path=max(b - a for a, b in pairwise(keys)),
    )


def _add_to_a_round(rounds: list[list[tuple[Segment, int]]], segment: Segment, place: int) -> None:
    start, stop = segment.prefix_start, segment.prefix_stop
    for members in rounds:
        if not any(start < other.prefix_stop and other.prefix_start < stop for other, _ in members):
            members.append((segment, place))
            return
    rounds.append([(segment, place)])


def _round(members: list[tuple[Segment, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    rows = [torch.arange(s.prefix_start, s.prefix_stop) for s, _ in members]
    places = [torch.arange(p, p + s.prefix_stop - s.prefix_start) for s, p in members]
    return torch.cat(rows).to(device), torch.cat(places).to(device)
