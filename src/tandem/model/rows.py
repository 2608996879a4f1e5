"""The last layer's MLP on those rows alone whose hidden state meets the output head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tandem.model.dropout import DropoutKeys


@dataclass
class ReadRows:
    """The rows of the current micro-batch that predict a target [R] int64; set before a forward."""

    rows: Tensor | None = None


def skip_unread_rows(model: Any) -> ReadRows:
    """Let the last decoder layer's MLP pass over rows that nothing reads.

    After the last layer's attention, rows no longer see each other, and only rows that predict a
    target go on to the head: for a prompt's rows the MLP's result, zero here, is never read. The
    module stays in place under its name, only its forward is replaced. Models whose last layer
    has no `mlp` are left as they are.
    """
    read = ReadRows()
    layers = getattr(model.get_decoder(), "layers", None) or getattr(model.get_decoder(), "h", None)
    mlp: nn.Module | None = getattr(layers[-1], "mlp", None) if layers is not None else None
    if mlp is None:
        return read
    whole = mlp.forward

    def forward(hidden: Tensor) -> Any:  # [1, T, H]
        rows = read.rows
        if rows is None:
            return whole(hidden)
        with _keys_of(model, rows):
            computed = whole(hidden.index_select(1, rows))
        return torch.zeros_like(hidden).index_copy(1, rows, computed)

    mlp.forward = forward
    return read


@contextmanager
def _keys_of(model: Any, rows: Tensor) -> Iterator[None]:
    """Inside, keyed dropout sees the keys of the rows that are computed."""
    shared: DropoutKeys | None = getattr(model, "tandem_dropout", None)
    if shared is None or shared.keys is None:
        yield
        return
    every = shared.keys
    shared.keys = every[rows]
    try:
        yield
    finally:
        shared.keys = every
