"""AdamW, its steps and its learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import get_scheduler


def make_optimizer(
    parameters: Iterable[Tensor],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
    kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over the trainable parameters, in torch's or a device's own form."""
    return kind(parameters, lr=learning_rate, weight_decay=weight_decay, betas=betas, eps=epsilon)


def clip_and_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[Tensor],
    *,
    max_norm: float | None,
    learning_rate: float,
) -> float:
    """Clip, apply and clear gradients; returns their norm before clipping.

    A norm that is not finite is returned without touching the parameters. Spread parameters make
    it collective.
    """
    limit = math.inf if max_norm is None else max_norm
    total = torch.nn.utils.clip_grad_norm_(parameters, limit)
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if math.isfinite(norm):
        set_rate(optimizer, learning_rate)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def set_rate(optimizer: Any, learning_rate: float) -> None:
    """Give all of an optimizer's parameters one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def make_schedule(
    name: str, *, learning_rate: float, warmup_steps: int, total_steps: int
) -> Callable[[int], float]:
    """transformers' schedule `name` as a function from a step's number, from 0, to its rate.

    A function of the number alone has no state to save, and a resumed run cannot be off by one.
    """
    # It asks for an optimizer, and reads only the peak rate from it.
    peak_only = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    schedule = get_scheduler(
        name, peak_only, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    (factor,), (peak,) = schedule.lr_lambdas, schedule.base_lrs
    return lambda step: float(peak * factor(step))


def warmup(total_steps: int, *, steps: int | None, ratio: float | None) -> int:
    """Warm-up steps from a count or a share of all steps (rounded up), none by default."""
    if steps is not None:
        return steps
    return math.ceil(total_steps * ratio) if ratio is not None else 0
