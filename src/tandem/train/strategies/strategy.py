"""What training asks of the ways in which processes share weights, gradients and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from tandem.data.collate import MicroBatch
from tandem.model.score import Scorer

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Strategy(Protocol):
    """One way to share the work of a step.

    A step's losses come divided by its own denominators, so gradients are summed, over
    micro-batches and processes, and never averaged.

    Attributes:
        name: what the recipe calls it.
        sharded: whether weights are spread over the processes, so that every forward and backward
            waits for the others: all then run equally many, and none can fail alone.
        needs_group: whether even a single process needs a process group.
        config: what else decides how the work is shared, the same in all processes.
        parameters: what the optimizer moves, by name; after `prepare`.
    """

    name: str
    sharded: bool
    needs_group: bool
    config: Mapping[str, Any]
    parameters: Mapping[str, Tensor]

    def prepare(
        self, scorer: Scorer, make_optimizer: MakeOptimizer, max_grad_norm: float | None
    ) -> None:
        """Take over a model with its adapter, on the CPU where `sharded`."""
        ...

    def score(self, batch: MicroBatch) -> Tensor:
        """Sequence log-probs [S], with gradients unless they are off."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients; `last` says that the step has no more of them."""
        ...

    def reduce(self) -> None:
        """Sum the step's gradients over the processes, where the backward has not done so."""
        ...

    def apply(self, learning_rate: float) -> float:
        """Clip, apply and clear the gradients; returns their norm before clipping.

        A norm that is not finite, or negative, means that nothing of the step may be kept.
        """
        ...

    def trained(self) -> dict[str, Tensor]:
        """What the optimizer moves, whole, by name; all processes call it."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, whole, as `parameter|key`; all processes call it."""
        ...

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the optimizer back to where `optimizer_state` found it."""
        ...
