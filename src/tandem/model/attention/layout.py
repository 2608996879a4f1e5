"""How rows of a micro-batch see each other, carried from the collator to the attention layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tandem.data.collate import Segment
from tandem.errors import UserError

# The keyword under which the layout travels through a transformers model's forward.
LAYOUT_KEYWORD = "tandem_layout"


def refuse_sinks(sinks: Tensor | None) -> None:
    """Raise UserError for models whose softmax has learnt sinks: ignoring them would be wrong."""
    if sinks is not None:
        raise UserError("models with attention sinks (such as gpt-oss) cannot be trained yet")


@dataclass(frozen=True)
class TreeLayout:
    """The segments of a micro-batch and, for masks, its position ids [T].

    Masks are built at most once for each sliding window and kept for the other layers.
    """

    segments: tuple[Segment, ...]
    position_ids: Tensor
    _masks: dict[int | None, Tensor] = field(default_factory=dict)
    _table: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def longest_path(self) -> int:
        """The longest sequence of the micro-batch in tokens."""
        return max(s.stop - s.start + s.prefix_stop - s.prefix_start for s in self.segments)

    def mask(self, window: int | None) -> Tensor:
        """[T, T] bool: which keys (columns) each query (row) sees.

        A sliding window counts positions on the path, not rows of the micro-batch.
        """
        if window is not None and window >= self.longest_path():
            window = None
        if window not in self._masks:
            self._masks[window] = self._build(window)
        return self._masks[window]

    def table(self) -> tuple[Tensor, Tensor]:
        """The segments as numbers, for kernels: [n, 4] int64, and where each tree begins [t + 1].

        A tree is a segment without a prefix and those after it whose prefix lies in it.
        """
        if not self._table:
            rows = [(s.start, s.stop, s.prefix_start, s.prefix_stop) for s in self.segments]
            roots = [i for i, (_, _, start, stop) in enumerate(rows) if start == stop]
            trees = torch.tensor([*roots, len(rows)])
            self._table.append((torch.tensor(rows, dtype=torch.int64), trees))
        return self._table[0]

    def _build(self, window: int | None) -> Tensor:
        rows = self.position_ids.shape[0]
        device = self.position_ids.device
        visible = torch.zeros(rows, rows, dtype=torch.bool, device=device)
        for segment in self.segments:
            queries = slice(segment.start, segment.stop)
            length = segment.stop - segment.start
            causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
            visible[queries, queries] = causal
            visible[queries, segment.prefix_start : segment.prefix_stop] = True
        if window is not None:
            distance = self.position_ids[:, None] - self.position_ids[None, :]
            visible &= distance < window
        return visible
