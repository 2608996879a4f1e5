"""A step's gradients in one flat buffer, summed over micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tandem.errors import TandemError


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
