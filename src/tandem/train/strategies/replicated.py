"""Whole weights in every process: `single`, and `ddp` for several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tandem.data.collate import MicroBatch
from tandem.model.adapter import trainable_parameters
from tandem.model.score import Scorer
from tandem.train.optim import clip_and_step
from tandem.train.strategies.gradients import FlatGradients
from tandem.train.strategies.state import load_state, state_of
from tandem.train.strategies.strategy import MakeOptimizer

# Elements of the gradients that travel at once: bounds what a backend holds beside them.
_BUCKET = 2**24


class Replicated:
    """Each process computes its share of a step by itself; gradients are summed once, at its end.

    With adapters alone to exchange, there is nothing to gain from sending parts of them while
    the backward still runs, and a micro-batch that fails concerns one process only.

    Args:
        name: single or ddp.
        processes: how many there are.
    """

    sharded = False
    needs_group = False

    def __init__(self, name: str, processes: int) -> None:
        self.name = name
        self.processes = processes
        self.config: Mapping[str, Any] = {}
        self.parameters: Mapping[str, Tensor] = {}

    def prepare(
        self, scorer: Scorer, make_optimizer: MakeOptimizer, max_grad_norm: float | None
    ) -> None:
        """See `Strategy.prepare`."""
        self.scorer = scorer
        self.parameters = trainable_parameters(scorer.model)
        self.max_grad_norm = max_grad_norm
        self.gradients = FlatGradients(list(self.parameters.values()))
        self.optimizer = make_optimizer(self.parameters.values())

    def score(self, batch: MicroBatch) -> Tensor:
        """See `Strategy.score`."""
        scored: Tensor = self.scorer(batch)
        return scored

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Strategy.backward`."""
        del last
        self.gradients.add(loss)

    def reduce(self) -> None:
        """See `Strategy.reduce`."""
        if self.processes > 1:
            for part in self.gradients.flat.split(_BUCKET):
                dist.all_reduce(part)

    def apply(self, learning_rate: float) -> float:
        """See `Strategy.apply`."""
        for parameter, gradient in zip(self.parameters.values(), self.gradients.views, strict=True):
            parameter.grad = gradient
        norm = clip_and_step(
            self.optimizer,
            self.parameters.values(),
            max_norm=self.max_grad_norm,
            learning_rate=learning_rate,
        )
        self.gradients.clear()
        return norm

    def trained(self) -> dict[str, Tensor]:
        """See `Strategy.trained`."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Strategy.optimizer_state`."""
        return state_of(self.optimizer, self.parameters)

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Strategy.load_optimizer`."""
        load_state(self.optimizer, self.parameters, tensors)
