"""Averages of the weights on the way, which become a run's result in their place."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


class Average(Protocol):
    """What is saved and scored in place of the weights that the optimizer moves."""

    def of(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter's average, spread over the processes as the parameter is."""
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


def average_of(optimizer: Any) -> Average | None:
    """The average that a run keeps, if any."""
    return OfOptimizer(optimizer) if isinstance(optimizer, Averaging) else None
