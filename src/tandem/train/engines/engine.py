"""What training asks of the ways in which processes share weights, gradients and optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from tandem.data.batching.collate import MicroBatch
from tandem.errors import TandemError, UserError
from tandem.integrations.gaudi.static_shapes import Buckets, fill_up
from tandem.model.logprobs.sequence_logps import Scorer
from tandem.runtime.device import Device
from tandem.runtime.process_group import ProcessGroup

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Strategy(Protocol):
    """One way to share the work of a step.

    A step's losses come divided by its own denominators, so gradients are summed, over
    micro-batches and processes, and never averaged.

    Attributes:
        name: what the recipe calls it.
        sharded: whether weights are spread over the processes, so that every forward and backward
            waits for the others: all then run equally many, and none can fail alone.
        needs_group: whether even a single process needs a process group.
        config: what else decides how the work is shared, the same in all processes.
        parameters: what the optimizer moves, by name; after `prepare`.
    """

    name: str
    sharded: bool
    needs_group: bool
    config: Mapping[str, Any]
    parameters: Mapping[str, Tensor]

    def prepare(
        self, scorer: Scorer, make_optimizer: MakeOptimizer, max_grad_norm: float | None
    ) -> None:
        """Take over a model with its adapter, on the CPU where `sharded`."""
        ...

    def score(self, batch: MicroBatch) -> Tensor:
        """Sequence log-probs [S], with gradients unless they are off."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients; `last` says that the step has no more of them."""
        ...

    def reduce(self) -> None:
        """Sum the step's gradients over the processes, where the backward has not done so."""
        ...

    def apply(self, learning_rate: float) -> float:
        """Clip, apply and clear the gradients; returns their norm before clipping.

        A norm that is not finite, or negative, means that nothing of the step may be kept.
        """
        ...

    def trained(self) -> dict[str, Tensor]:
        """What the optimizer moves, whole, by name; all processes call it."""
        ...

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, whole, as `parameter|key`; all processes call it."""
        ...

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the optimizer back to where `optimizer_state` found it."""
        ...


T = TypeVar("T")
R = TypeVar("R")


class Engine:
    """Runs forward, backward and optimizer steps for one scorer on this process's device.

    Losses come divided by the step's own denominators, and gradients are summed over micro-batches
    and processes. How the processes share weights and optimizer is the strategy's.

    Args:
        device: of this process.
        processes: that are in contact.
        strategy: how they share the work.

    Raises UserError for a number format that cannot be trained in, and a device that accelerate
    does not take.
    """

    def __init__(self, device: Device, processes: ProcessGroup, strategy: Strategy) -> None:
        self.device = device
        self.processes = processes
        self.strategy = strategy
        # Where the device has static shapes, those that a stage declares.
        self.buckets: Buckets | None = None
        self.model: Any = None
        if device.weights == torch.float16:
            raise UserError(
                "dtype: float16 has too narrow a range to train in without loss scaling; "
                "use bfloat16 (or float32)"
            )
        if processes.count == 1 and strategy.needs_group and not dist.is_initialized():
            # Of one process; DeepSpeed and FSDP2 know no other way.
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(device.backend, store=store, rank=0, world_size=1)
        precision = "bf16" if device.weights == torch.bfloat16 else "no"
        self.accelerator = Accelerator(cpu=device.is_host, mixed_precision=precision)
        _same_device(self.accelerator, device)
        _same_processes(self.accelerator, processes)

    @property
    def sharded(self) -> bool:
        """Whether every forward and backward waits for the other processes."""
        return self.strategy.sharded

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

    def gather(self, compute: Callable[[], T], finish: Callable[[T], R]) -> list[R]:
        """Run `finish(compute())` in every process; all results by rank, in every process.

        `compute` is where the model runs. What fails there in one process alone ends them all, see
        `ProcessGroup.gather`; but where weights are spread, the others wait inside the model, and
        find out when that process has gone.
        """
        if self.sharded:
            computed = compute()
            return self.processes.gather(lambda: finish(computed))
        return self.processes.gather(lambda: finish(compute()))


def _same_device(accelerator: Accelerator, device: Device) -> None:
    """accelerate chooses a device by itself; autocast and gradients must be on tandem's."""
    taken = accelerator.device.type
    if taken != device.kind:
        raise UserError(
            f"device: {device.kind} was asked for, but accelerate prefers {taken} on this machine. "
            f"Hide that device, or set ACCELERATE_TORCH_DEVICE={device.kind}."
        )


def _same_processes(accelerator: Accelerator, processes: ProcessGroup) -> None:
    """accelerate takes part in what it finds, which must be what was launched."""
    obtained = (accelerator.process_index, accelerator.num_processes)
    if obtained != (processes.rank, processes.count):
        raise TandemError(
            f"launched as process {processes.rank} of {processes.count}, but accelerate takes part "
            f"as {obtained[0]} of {obtained[1]}"
        )
