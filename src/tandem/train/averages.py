"""Averages of the weights on the way, which become a run's result in their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


class Average(Protocol):
    """What is saved and scored in place of the weights that the optimizer moves."""

    def of(self, name: str, parameter: Tensor) -> Tensor:
        """What this process holds of a parameter's average, as of the parameter itself."""
        ...

    def follow(self, pieces: Iterable[Tensor]) -> None:
        """Take in what this process holds of each parameter after a step, in their order."""
        ...


@runtime_checkable
class Averaging(Protocol):
    """An optimizer that keeps an average itself."""

    def averaged(self, parameter: Tensor) -> Tensor:
        """A parameter's average; the parameter before the first step."""
        ...


class OfOptimizer:
    """The average that an optimizer keeps."""

    def __init__(self, optimizer: Averaging) -> None:
        self._optimizer = optimizer

    def of(self, name: str, parameter: Tensor) -> Tensor:
        """See `Average.of`."""
        del name
        return self._optimizer.averaged(parameter)

    def follow(self, pieces: Iterable[Tensor]) -> None:
        """See `Average.follow`; the optimizer has done so."""


class MovingAverage:
    """average = decay x average + (1 - decay) x weights after each step, from where they began."""

    def __init__(self, decay: float, start: Mapping[str, Tensor]) -> None:
        """`start`: what this process holds of each parameter's average, by name; it is changed."""
        self._decay, self._values = decay, dict(start)

    def of(self, name: str, parameter: Tensor) -> Tensor:
        """See `Average.of`."""
        del parameter
        return self._values[name]

    @torch.no_grad()
    def follow(self, pieces: Iterable[Tensor]) -> None:
        """See `Average.follow`."""
        for value, piece in zip(self._values.values(), pieces, strict=True):
            value.lerp_(piece, 1 - self._decay)


def average_of(optimizer: Any) -> Average | None:
    """The average that an optimizer keeps, if it does."""
    return OfOptimizer(optimizer) if isinstance(optimizer, Averaging) else None
