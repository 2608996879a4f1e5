"""Muon: matrices step by their orthogonalised momentum, and everything else by AdamW."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

# Of Newton and Schulz's iteration: a quintic whose slope at 0 is steep, so that five steps do.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_SMALLEST_NORM = 1e-7
# The root mean square of AdamW's updates, so that both kinds can have one learning rate.
_LIKE_ADAMW = 0.2


def groups_of(parameters: Mapping[str, Tensor], matrices: Collection[str]) -> list[dict[str, Any]]:
    """Parameters in two groups: `matrices`, by name, and the others; an empty one is left out."""
    parts = {
        kind: [p for name, p in parameters.items() if (name in matrices) is kind]
        for kind in (True, False)
    }
    return [{"params": part, "orthogonal": kind} for kind, part in parts.items() if part]


class Muon(torch.optim.Optimizer):
    """https://kellerjordan.github.io/posts/muon with the scale and decay of arXiv 2502.16982.

    It is torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, but for two things: the iteration
    has the parameters' precision where torch's has bfloat16, whose rounding would make a step
    depend on how its work is packed; and it takes other parameters as well, which AdamW moves.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """`groups` as from `groups_of`; betas and eps are AdamW's."""
        defaults = {
            "lr": lr, "momentum": momentum, "betas": betas, "eps": eps,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._momentum if group["orthogonal"] else self._adamw
                parameter.sub_(update(parameter, group), alpha=group["lr"])

    def _momentum(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(state["momentum"], group["momentum"])  # Nesterov's
        return orthogonalised(ahead).mul_(_LIKE_ADAMW * math.sqrt(max(matrix.shape)))

    def _adamw(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """AdamW's update (arXiv 1711.05101, algorithm 2, line 12 without rate and decay)."""
        state, gradient, (beta1, beta2) = self.state[parameter], parameter.grad, group["betas"]
        assert gradient is not None
        if not state:
            zeros = torch.zeros_like
            state.update(step=0, exp_avg=zeros(parameter), exp_avg_sq=zeros(parameter))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = state["exp_avg_sq"].div(1 - beta2 ** state["step"]).sqrt_().add_(group["eps"])
        return state["exp_avg"].div(root).div_(1 - beta1 ** state["step"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix [m, n] with about the same singular vectors, and singular values of about 1."""
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / wide.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(_STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide is matrix else x.T
