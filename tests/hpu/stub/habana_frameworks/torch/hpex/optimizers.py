"""FusedAdamW, which takes fewer arguments than torch's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

made: list[torch.optim.Optimizer] = []


class FusedAdamW(torch.optim.AdamW):
    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        made.append(self)
