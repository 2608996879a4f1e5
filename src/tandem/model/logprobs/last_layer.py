"""What the last decoder layer need not compute: its MLP, for rows that no target reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem.model.lora.forward import DropoutKeys
from tandem.model.unwrap import layers_of


@dataclass
class ReadRows:
    """The rows of the current micro-batch that predict a target [R] int64; set before a forward."""

    rows: Tensor | None = None


def skip_unread_rows(model: Any) -> None:
    """Let the last decoder layer's MLP pass over rows that nothing reads; done at most once.

    After the last layer's attention, rows no longer see each other, and only rows that predict a
    target go on to the head: for the others the MLP's result, zero here, is never read. Models
    whose last layer has no `mlp` are left as they are.
    """
    if hasattr(model, "tandem_rows"):
        return
    model.tandem_rows = read = ReadRows()
    layers = layers_of(model)
    mlp: Any = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None:
        return
    every_row = mlp.forward

    def forward(hidden: Tensor) -> Any:  # [1, T, H]
        rows = read.rows
        if rows is None:
            return every_row(hidden)
        with _keys_of(model, rows):
            computed = every_row(hidden.index_select(1, rows))
        return torch.zeros_like(hidden).index_copy(1, rows, computed)

    mlp.forward = forward


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
