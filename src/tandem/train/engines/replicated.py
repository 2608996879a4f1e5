"""`single` and `ddp`: every process has the whole model, and gradients are summed once a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from tandem.errors import TandemError
from tandem.train.engines.engine import Engine, MakeOptimizer

# Elements of the gradients that travel at once: bounds what a backend holds beside them.
_BUCKET = 2**24


class FlatGradients:
    """The gradients of parameters, all of one dtype on one device, as views of one buffer.

    A micro-batch's gradients are added when all of them are there, so one that fails half-way
    has added nothing and can be done again.
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
        gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        for view, gradient in zip(self.views, gradients, strict=True):
            view.add_(gradient)

    def clear(self) -> None:
        """Back to zero, for the next step."""
        self.flat.zero_()


class ReplicatedEngine(Engine):
    """Each process computes its share of a step by itself; gradients are summed once, at its end.

    Adapters are too small to gain from an exchange during the backward, and a micro-batch that
    fails concerns one process only.
    """

    @property
    def name(self) -> str:  # type: ignore[override]
        """ddp, or single for one process."""
        return "single" if self.processes.count == 1 else "ddp"

    def _share(self, make_optimizer: MakeOptimizer) -> None:
        self.gradients = FlatGradients(list(self.parameters.values()))
        self.optimizer = make_optimizer(self.parameters)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        del last
        self.gradients.add(loss)

    def _reduce(self) -> None:
        if self.processes.count > 1:
            for part in self.gradients.flat.split(_BUCKET):
                dist.all_reduce(part)

    def _apply(self, learning_rate: float) -> float:
        for parameter, gradient in zip(self.parameters.values(), self.gradients.views, strict=True):
            parameter.grad = gradient
        norm = super()._apply(learning_rate)
        self.gradients.clear()
        return norm
