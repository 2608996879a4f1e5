"""The device and process side of training, on accelerate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from tandem.data.buckets import Buckets, fill_up
from tandem.data.collate import MicroBatch
from tandem.errors import TandemError, UserError
from tandem.model.score import Scorer
from tandem.train.device import Device
from tandem.train.launch import Launch, launched
from tandem.train.processes import Processes

# Longer than one process may keep the others waiting: hashing weights, preparing data, saving.
_PATIENCE = timedelta(hours=1)


class Engine:
    """Runs forward, backward and clipping for one scorer on this process's device.

    Losses come divided by the step's own denominators, so accumulation is the sum of backwards
    and accelerate's own accumulation stays at one. Where a launcher started several processes,
    each backward adds to this process's gradients, and the step's last one exchanges them (DDP).
    DDP averages, so losses are multiplied by the number of processes.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        # Where the device has static shapes, those that a stage declares.
        self.buckets: Buckets | None = None
        if device.weights == torch.float16:
            raise UserError(
                "dtype: float16 has too narrow a range to train in without loss scaling; "
                "use bfloat16 (or float32)"
            )
        precision = "bf16" if device.weights == torch.bfloat16 else "no"
        launch = launched()
        handlers = (
            [InitProcessGroupKwargs(backend=device.backend, timeout=_PATIENCE)]
            if launch.count > 1
            else []
        )
        self.accelerator = Accelerator(
            cpu=device.is_host, mixed_precision=precision, kwargs_handlers=handlers
        )
        _same_device(self.accelerator, device)
        self.processes = _processes(self.accelerator, launch, device)
        self.model: Any = None
        self.scorer: Any = None
        self.optimizer: Any = None
        self._plain: Any = None

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Take over a model (adapters included) and its optimizer."""
        self.model = model
        self._plain = Scorer(model, self.device.sums)
        # Frozen weights and buffers come from the same files on every rank; DDP would send the
        # first at the start and the second with every forward.
        self._plain._ddp_params_and_buffers_to_ignore = [
            *(name for name, p in self._plain.named_parameters() if not p.requires_grad),
            *(name for name, _ in self._plain.named_buffers()),
        ]
        if optimizer is None:
            self.scorer = self.accelerator.prepare(self._plain)
        else:
            self.scorer, self.optimizer = self.accelerator.prepare(self._plain, optimizer)

    def score(self, batch: MicroBatch, *, last: bool = True) -> Tensor:
        """Sequence log-probs [S] of a micro-batch, with gradients unless they are off.

        Where shapes are declared, the micro-batch is filled up first, and zeros of sequences that
        do not exist follow the others.

        With gradients, all ranks call it equally often, and `last` says which micro-batch is the
        step's last: its backward exchanges the gradients.
        """
        if self.buckets is not None:
            batch = fill_up(batch, self.buckets.bucket_for(batch))
        here = batch.to(self.device.torch_device)
        if not torch.is_grad_enabled():
            return self._plain(here)
        # DDP decides in the forward whether the backward that follows exchanges.
        with nullcontext() if last else self.accelerator.no_sync(self.scorer):
            return self.scorer(here)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a part of the step's loss, after its own `score`."""
        self.accelerator.backward(loss * self.processes.count if self.processes.count > 1 else loss)
        self.device.step_boundary()

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
        self.device.step_boundary()
        return norm


def _same_device(accelerator: Accelerator, device: Device) -> None:
    """accelerate chooses a device by itself; autocast and gradients must be on tandem's."""
    taken = accelerator.device.type
    if taken != device.kind:
        raise UserError(
            f"device: {device.kind} was asked for, but accelerate prefers {taken} on this machine. "
            f"Hide that device, or set ACCELERATE_TORCH_DEVICE={device.kind}."
        )


def _processes(accelerator: Accelerator, launch: Launch, device: Device) -> Processes:
    """The processes that accelerate joined, which must be those that were launched."""
    obtained = (accelerator.process_index, accelerator.num_processes)
    if obtained != (launch.rank, launch.count):
        raise TandemError(
            f"launched as process {launch.rank} of {launch.count}, but accelerate takes part as "
            f"{obtained[0]} of {obtained[1]}"
        )
    if launch.count == 1:
        return Processes(launch)
    # Plain values travel on the CPU, whatever carries gradients.
    group = dist.group.WORLD if device.backend == "gloo" else _control_group()
    return Processes(launch, group)


@cache
def _control_group() -> Any:
    return dist.new_group(backend="gloo", timeout=_PATIENCE)
