"""Schedule-free AdamW: gradients are taken near the average of all steps, which is the result."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Algorithm 1 of arXiv 2405.15682, with its weights of steps: the largest rate so far, squared.

    The parameters hold y, where gradients are taken. The state has z, which the steps move. The
    result is x, the average of z, from which y = beta1 x + (1 - beta1) z follows. Parameters are
    moved as in the authors' package `schedulefree`, so that x need not be kept: see `averaged`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def averaged(self, parameter: Tensor) -> Tensor:
        """A parameter's x: what is saved and scored."""
        state = self.state.get(parameter)
        if not state:
            return parameter.detach()
        beta1, _ = self.defaults["betas"]
        return parameter.detach().lerp(state["z"], 1 - 1 / beta1)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, rate, (beta1, beta2) = self.state[parameter], group["lr"], group["betas"]
        if not state:
            state.update(
                z=parameter.detach().clone(), exp_avg_sq=torch.zeros_like(parameter),
                step=0, largest=0.0, weights=0.0,
            )  # fmt: skip
        state["step"] += 1
        state["largest"] = max(rate, state["largest"])
        weight = state["largest"] ** 2
        state["weights"] += weight
        share = weight / state["weights"] if weight else 0.0

        gradient, squares = parameter.grad, state["exp_avg_sq"]
        assert gradient is not None
        squares.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = squares.div(1 - beta2 ** state["step"]).sqrt_().add_(group["eps"])
        update = gradient.div(root)
        # The decay is taken at y, as in the paper's experiments.
        update.add_(parameter, alpha=group["weight_decay"])
        parameter.lerp_(state["z"], share).add_(update, alpha=rate * (beta1 * (1 - share) - 1))
        state["z"].sub_(update, alpha=rate)
