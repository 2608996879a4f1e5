"""The device and process side of training, on accelerate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tandem.data.collate import MicroBatch
from tandem.errors import UserError
from tandem.model.score import Scorer
from tandem.train.device import Device


class Engine:
    """Runs forward, backward and clipping for one scorer on one device.

    Losses come divided by the step's own denominators, so accumulation is the sum of backwards
    and accelerate's own accumulation stays at one.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        if device.weights == torch.float16:
            raise UserError(
                "dtype: float16 has too narrow a range to train in without loss scaling; "
                "use bfloat16 (or float32)"
            )
        precision = "bf16" if device.weights == torch.bfloat16 else "no"
        self.accelerator = Accelerator(cpu=device.kind == "cpu", mixed_precision=precision)
        if self.accelerator.num_processes > 1:
            raise UserError(
                f"this version trains in one process; it was launched in "
                f"{self.accelerator.num_processes}. Start it without a launcher."
            )
        self.model: Any = None
        self.scorer: Any = None
        self.optimizer: Any = None

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Take over a model (adapters included) and its optimizer."""
        self.model = model
        scorer = Scorer(model)
        if optimizer is None:
            self.scorer = self.accelerator.prepare(scorer)
        else:
            self.scorer, self.optimizer = self.accelerator.prepare(scorer, optimizer)

    def score(self, batch: MicroBatch) -> Tensor:
        """Sequence log-probs [S] of a micro-batch, with gradients unless they are off."""
        logps: Tensor = self.scorer(batch.to(self.device.torch_device))
        return logps

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a part of the step's loss."""
        self.accelerator.backward(loss)

    def step(
        self, parameters: Iterable[Tensor], learning_rate: float, max_grad_norm: float | None
    ) -> float:
        """Clip, apply and clear the gradients; returns their norm before clipping.

        A norm that is not finite is returned without touching the parameters.
        """
        limit = float("inf") if max_grad_norm is None else max_grad_norm
        norm = float(self.accelerator.clip_grad_norm_(list(parameters), limit))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
