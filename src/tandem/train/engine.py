"""The device and process side of training: accelerate's processes and mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

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
from tandem.train.strategies.strategy import MakeOptimizer, Strategy

T = TypeVar("T")
R = TypeVar("R")

# Longer than one process may keep the others waiting: hashing weights, preparing data, saving.
_PATIENCE = timedelta(hours=1)


class Engine:
    """Runs forward, backward and optimizer steps for one scorer on this process's device.

    Losses come divided by the step's own denominators, and gradients are summed over micro-batches
    and processes. How the processes share weights and optimizer is the strategy's.

    Args:
        device: of this process.
        patience: how long a process waits for the others.
    """

    def __init__(self, device: Device, *, patience: timedelta = _PATIENCE) -> None:
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
            [InitProcessGroupKwargs(backend=device.backend, timeout=patience)]
            if launch.count > 1
            else []
        )
        self.accelerator = Accelerator(
            cpu=device.is_host, mixed_precision=precision, kwargs_handlers=handlers
        )
        _same_device(self.accelerator, device)
        self.processes = _processes(self.accelerator, launch, patience)
        self.model: Any = None
        self.strategy: Any = None

    @property
    def sharded(self) -> bool:
        """Whether every forward and backward waits for the other processes."""
        sharded: bool = self.strategy.sharded
        return sharded

    def take(self, strategy: Strategy) -> None:
        """Choose how the processes share the work, before there is a model."""
        if self.processes.count == 1 and not dist.is_initialized() and strategy.needs_group:
            # Of one process; DeepSpeed and FSDP2 know no other way.
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(self.device.backend, store=store, rank=0, world_size=1)
        self.strategy = strategy

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, max_grad_norm: float | None
    ) -> None:
        """Take over a model, adapter included.

        Args:
            model: on the CPU where `sharded`, else on the device.
            make_optimizer: called with the parameters that it moves.
            max_grad_norm: gradients are clipped to it; None leaves them alone.
        """
        self.model = model
        mixed = self.accelerator.mixed_precision != "no"
        precision = self.accelerator.autocast if mixed else nullcontext
        scorer = Scorer(model, precision, self.device.sums)
        self.strategy.prepare(scorer, make_optimizer, max_grad_norm)

    def score(self, batch: MicroBatch) -> Tensor:
        """Sequence log-probs [S] of a micro-batch, with gradients unless they are off.

        Where shapes are declared, the micro-batch is filled up first, and zeros of sequences that
        do not exist follow the others.
        """
        if self.buckets is not None:
            batch = fill_up(batch, self.buckets.bucket_for(batch))
        logps: Tensor = self.strategy.score(batch.to(self.device.torch_device))
        return logps

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a part of the step's loss; `last` where no more will follow."""
        self.strategy.backward(loss, last=last)
        self.device.step_boundary()

    def step(self, learning_rate: float) -> float:
        """Sum the gradients over the processes, clip, apply and clear them.

        Returns their norm before clipping. If it is not finite, nothing may be kept of the model.
        """
        self.strategy.reduce()
        norm: float = self.strategy.apply(learning_rate)
        self.device.step_boundary()
        return norm if norm >= 0 else float("nan")

    def exchange(self, compute: Callable[[], T], finish: Callable[[T], R]) -> list[R]:
        """Run `finish(compute())` in every process; all results by rank, in every process.

        `compute` is where the model runs. What fails there in one process alone ends them all, see
        `Processes.exchange`; but where weights are spread, the others wait inside the model, and
        find out when that process has gone.
        """
        if self.sharded:
            computed = compute()
            return self.processes.exchange(lambda: finish(computed))
        return self.processes.exchange(lambda: finish(compute()))


def _same_device(accelerator: Accelerator, device: Device) -> None:
    """accelerate chooses a device by itself; autocast and gradients must be on tandem's."""
    taken = accelerator.device.type
    if taken != device.kind:
        raise UserError(
            f"device: {device.kind} was asked for, but accelerate prefers {taken} on this machine. "
            f"Hide that device, or set ACCELERATE_TORCH_DEVICE={device.kind}."
        )


def _processes(accelerator: Accelerator, launch: Launch, patience: timedelta) -> Processes:
    """The processes that accelerate joined, which must be those that were launched."""
    obtained = (accelerator.process_index, accelerator.num_processes)
    if obtained != (launch.rank, launch.count):
        raise TandemError(
            f"launched as process {launch.rank} of {launch.count}, but accelerate takes part as "
            f"{obtained[0]} of {obtained[1]}"
        )
    if launch.count == 1:
        return Processes(launch)
    # Plain values travel on the CPU, whatever carries gradients, and in a group of their own.
    return Processes(launch, _control_group(patience))


@cache
def _control_group(patience: timedelta) -> Any:
    return dist.new_group(backend="gloo", timeout=patience)
