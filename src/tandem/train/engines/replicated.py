"""A step's gradients in one flat buffer, summed over micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tandem.data.batching.collate import MicroBatch
from tandem.errors import TandemError
from tandem.model.logprobs.sequence_logps import Scorer
from tandem.model.trained_weights import trainable_parameters
from tandem.train.engines.engine import MakeOptimizer
from tandem.train.engines.optimizer_state import load_state, state_of
from tandem.train.optimizers import clip_and_step


class FlatGradients:
    """The gradients of some parameters as views of one buffer.

    A micro-batch's gradients are added when all of them are there, so one that fails half-way
    has added nothing and can be done again.

    Args:
        parameters: what gradients are of, all of one dtype on one device.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        kinds = {(p.dtype, p.device) for p in self.parameters}
        if len(kinds) != 1:
            raise TandemError(f"the trained parameters are of several kinds: {kinds}")
        sizes = [p.numel() for p in self.parameters]
        self.flat = self.parameters[0].detach().new_zeros(sum(sizes))
        parts = self.flat.split(sizes)
        self.views = [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def add(self, loss: Tensor) -> None:
        """Add the gradients of a loss; a parameter that it does not reach has a gradient of 0."""
        # Without touching `.grad`, so that no hook of whoever else watches the parameters runs.
        found = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        for view, gradient in zip(self.views, found, strict=True):
            view.add_(gradient)

    def clear(self) -> None:
        """Back to zero, for the next step."""
        self.flat.zero_()


class HandOver(nn.Module):
    """The trained parameters as a module, whose backward gives them gradients that are known.

    For an engine that wants to see a forward and a backward: it sees one of each a step, after
    all micro-batches, and knows nothing of the model.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        """A zero whose gradients are these, each of its parameter's shape."""
        zero: Tensor = _Known.apply(gradients, *self.trained)
        return zero


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient * grad_outputs[0] for gradient in ctx.gradients)


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
