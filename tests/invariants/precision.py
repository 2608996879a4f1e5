"""Float64 from the embedding to the logits, whatever a model casts to float32 on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoFloat32(TorchFunctionMode):
    """Every cast to float32, and every tensor made in it, becomes float64.

    Norms, rotary embeddings, softmaxes, routers and recurrences of transformers pass through
    float32, each under another name; below this mode none of them can.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        return func(
            *(_wider(value) for value in args),
            **{name: _wider(value) for name, value in (kwargs or {}).items()},
        )


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def everything_in_float64() -> Iterator[None]:
    """Inside, forwards of float64 models stay in float64, and so do their backwards.

    What a backward computes once more, under activation checkpointing, does not.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _NoFloat32():
            yield
    finally:
        torch.set_default_dtype(before)
