"""The base class of engines: how processes share weights, gradients and optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from tandem.data.batching.collate import MicroBatch
from tandem.errors import TandemError, UserError
from tandem.model.generate import GeneratedAnswer, Sampling, generate_answers
from tandem.model.logprobs.sequence_logps import Scorer
from tandem.model.trained_weights import trainable_parameters
from tandem.runtime.device import BatchShapes, Device
from tandem.runtime.host_memory import give_back_freed_memory
from tandem.runtime.process_group import ProcessGroup
from tandem.train.averages import Average, MovingAverage, average_of
from tandem.train.engines.spread_model import SpreadModel
from tandem.train.optimizers import (
    Pieces,
    clip_and_step,
    load_state,
    spread_like,
    state_of,
    whole,
)

MakeOptimizer = Callable[[Mapping[str, Tensor]], torch.optim.Optimizer]
# The key of weights that move, beside the optimizer's own, where an average of them is kept.
_LIVE = "live"

T = TypeVar("T")
R = TypeVar("R")


class Engine(ABC):
    """Runs forward, backward and optimizer steps of a model on this process's device.

    A subclass says how the processes share weights, gradients and optimizer: it fills in the
    methods that begin with an underscore, and `load_optimizer` if torch's optimizer does not hold
    the state. Losses come divided by the
    step's own denominators, so gradients are summed over micro-batches and processes, never
    averaged. `config` is what else decides how the work is shared, the same in all processes.

    Raises UserError for a number format that cannot be trained in, and a device that accelerate
    does not take.
    """

    name: str  # what the recipe calls it
    optimizer: torch.optim.Optimizer
    # whether weights are spread over the processes, so that every forward and backward waits for
    # the others: all then run equally many, and none can fail alone
    sharded: ClassVar[bool] = False
    needs_group: ClassVar[bool] = False  # whether even a single process needs a process group
    pieces: ClassVar[Pieces] = "whole"  # what its optimizer holds of each parameter
    average: Average | None = None  # of the weights, which is scored and saved in their place

    def __init__(
        self, device: Device, processes: ProcessGroup, config: Mapping[str, Any] | None = None
    ) -> None:
        self.device, self.processes = device, processes
        self.config: Mapping[str, Any] = config or {}
        # The shapes that micro-batches are padded to, where the device declares some.
        self.shapes: BatchShapes | None = None
        # After `prepare`: the model, and what the optimizer moves, by name.
        self.model: Any = None
        self.parameters: Mapping[str, Any] = {}
        if device.weights == torch.float16:
            raise UserError(
                "dtype: float16 has too narrow a range to train in without loss scaling; "
                "use bfloat16 (or float32)"
            )
        if processes.count == 1 and self.needs_group and not dist.is_initialized():
            # Of one process; DeepSpeed and FSDP2 know no other way.
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(device.backend, store=store, rank=0, world_size=1)
        if self.sharded and device.is_host:
            give_back_freed_memory()
        precision = "bf16" if device.weights == torch.bfloat16 else "no"
        self.accelerator = Accelerator(cpu=device.is_host, mixed_precision=precision)
        _check_accelerate(self.accelerator, device, processes)

    def prepare(
        self,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        max_grad_norm: float | None,
        of_token: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Take over a model, on the CPU if `sharded`.

        Gradients are clipped to `max_grad_norm` if it is set; `of_token` is as in `sequence_logps`.
        """
        self.model = model
        self.parameters = trainable_parameters(model)
        self.max_grad_norm = max_grad_norm
        mixed = self.accelerator.mixed_precision != "no"
        precision = self.accelerator.autocast if mixed else nullcontext
        self.scorer: Any = Scorer(model, precision, self.device.sums, of_token)

        def watched(parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
            optimizer = make_optimizer(parameters)
            self.average = average_of(optimizer)
            return optimizer

        self._share(watched)

    def keep_average(self, decay: float, start: Mapping[str, Tensor]) -> None:
        """Keep a moving average of the weights from now on; after `prepare`.

        `start` has the average so far, whole, by name; empty: the weights as they are.
        """
        pieces = zip(self.parameters.items(), self._pieces(), strict=True)
        values = {
            name: self._piece(parameter, start[name]) if start else piece.clone()
            for (name, parameter), piece in pieces
        }
        self.average = MovingAverage(decay, values)

    def score(self, batch: MicroBatch) -> Tensor:
        """Sequence log-probs [S] of a micro-batch; zeros follow where it fills a declared shape."""
        if self.shapes is not None:
            batch = self.shapes.fill(batch)
        return self._score(batch.to(self.device.torch_device))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a part of the step's loss; `last` where no more will follow."""
        self._backward(loss, last=last)
        self.device.step_boundary()

    def step(self, learning_rate: float) -> float:
        """Sum the gradients over the processes, clip, apply and clear them.

        Returns their norm before clipping. If it is not finite, nothing may be kept of the model.
        """
        self._reduce()
        norm = self._apply(learning_rate)
        self._follow()
        self.device.step_boundary()
        return norm if norm >= 0 else float("nan")

    def trained(self) -> dict[str, Tensor]:
        """The weights that a run leaves, whole, by name, in rank 0; all processes call it.

        They are those that the optimizer moves, or their average where one is kept. Where weights
        are spread, the other processes get nothing, and rank 0 has them in the host's memory.
        """
        average = self.average
        if average is None:
            return self._live()
        pieces = ((p, average.of(name, p)) for name, p in self.parameters.items())
        return self._on_rank0(pieces)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back trained weights, given whole and by name, as `trained` returned them."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(spread_like(parameter, tensors[name]))

    @contextmanager
    def result_in_place(self) -> Iterator[None]:
        """Within it the model computes with what `trained` returns; afterwards as before."""
        average = self.average
        if average is None:
            yield
            return
        live = [piece.clone() for piece in self._pieces()]
        self._put([average.of(name, p) for name, p in self.parameters.items()])
        try:
            yield
        finally:
            self._put(live)

    def answers(
        self, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], sampling: Sampling
    ) -> list[GeneratedAnswer] | None:
        """Answers to prompts (token ids), in rank 0; None in the others, which all call it.

        The model is in evaluation mode and attends by its own attention. Raises UserError where
        weights are spread and the model's own `generate` would be needed.
        """
        if not self.sharded:  # the model is whole here
            ask = partial(
                generate_answers, self.model, prompts, stop_ids=stop_ids, sampling=sampling
            )
            return self.processes.rank0_alone(ask)
        answers = generate_answers(
            SpreadModel(self.model, self.compute, self.processes.raise_on_all),
            prompts,
            stop_ids=stop_ids,
            sampling=sampling,
        )
        return answers if self.processes.is_rank0 else None

    def compute(self, work: Callable[[], T]) -> T:
        """Run the model otherwise than to score; where weights are spread, all do it alike."""
        result: T = self.scorer(work)
        return result

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors, whole, as `parameter|key`; all processes call it.

        Where an average is kept, the weights that move are among them: `without_live` finds them.
        """
        tensors = self._optimizer_state()
        if self.average is not None:
            live = self._live().items()
            tensors |= {f"{name}|{_LIVE}": p.cpu().contiguous() for name, p in live}
        return tensors

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `optimizer_state` returned, without the weights that move."""
        load_state(self.optimizer, self.parameters, tensors)

    def gather(self, compute: Callable[[], T], finish: Callable[[T], R]) -> list[R]:
        """Run `finish(compute())` in every process; all results by rank, in every process.

        `compute` runs the model. A failure in one process ends them all, see `ProcessGroup.gather`;
        but where weights are spread, the others wait inside the model, and find out when it has
        gone.
        """
        if self.sharded:
            computed = compute()
            return self.processes.gather(lambda: finish(computed))
        return self.processes.gather(lambda: finish(compute()))

    def _optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's own tensors, whole, as `parameter|key`."""
        keep = self.processes.is_rank0 or not self.sharded
        return state_of(self.optimizer, self.parameters, keep=keep)

    def _live(self) -> dict[str, Tensor]:
        """What the optimizer moves, whole, by name; see `trained`."""
        return self._on_rank0((p, p) for p in self.parameters.values())

    def _on_rank0(self, pieces: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """What `_whole` returns of each parameter and a piece, in turn; see `trained`."""
        kept = {}
        for name, (parameter, piece) in zip(self.parameters, pieces, strict=True):
            tensor = self._whole(parameter, piece)
            if not self.sharded:
                kept[name] = tensor
            elif self.processes.is_rank0:
                kept[name] = tensor.cpu()
        return kept

    def _follow(self) -> None:
        """Let the average take in the weights after a step."""
        if self.average is not None:
            self.average.follow(self._pieces())

    def _pieces(self) -> list[Tensor]:
        """What this process holds of each parameter, as the optimizer moves it."""
        return [p.detach() for p in self.parameters.values()]

    def _piece(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """What this process holds of a parameter whose whole is `tensor`; a copy."""
        return spread_like(parameter, tensor)

    def _whole(self, parameter: Tensor, piece: Tensor) -> Tensor:
        """The tensor that all processes hold pieces of, as of a parameter; all call it."""
        del parameter
        return whole(piece)

    def _put(self, values: Sequence[Tensor]) -> None:
        """Let the model compute with other values, what this process holds of each."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters.values(), values, strict=True):
                parameter.copy_(value)

    @abstractmethod
    def _share(self, make_optimizer: MakeOptimizer) -> None:
        """Spread `self.scorer` and its parameters, and make `self.optimizer`."""

    def _score(self, batch: MicroBatch) -> Tensor:
        """Sequence log-probs [S] of a micro-batch on the device."""
        logps: Tensor = self.scorer(batch)
        return logps

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a micro-batch's gradients; `last` says that the step has no more of them."""

    def _reduce(self) -> None:  # noqa: B027 - most do it in the last backward
        """Sum the step's gradients over the processes, where the backward has not done so."""

    def _apply(self, learning_rate: float) -> float:
        """Clip, apply and clear the gradients; returns their norm before clipping.

        A norm that is not finite, or negative, means that nothing of the step may be kept.
        """
        return clip_and_step(
            self.optimizer, self.parameters.values(), self.max_grad_norm, learning_rate
        )


def without_live(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What `optimizer_state` returned: the optimizer's own tensors, and the weights by name."""
    end = f"|{_LIVE}"
    own = {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}
    live = {name.removesuffix(end): tensors[name] for name in tensors.keys() - own.keys()}
    return own, live


def _check_accelerate(accelerator: Accelerator, device: Device, processes: ProcessGroup) -> None:
    """accelerate chooses a device and finds processes by itself; both must be tandem's."""
    taken = accelerator.device.type
    if taken != device.kind:
        raise UserError(
            f"device: {device.kind} was asked for, but accelerate prefers {taken} on this machine. "
            f"Hide that device, or set ACCELERATE_TORCH_DEVICE={device.kind}."
        )
    obtained = (accelerator.process_index, accelerator.num_processes)
    if obtained != (processes.rank, processes.count):
        raise TandemError(
            f"launched as process {processes.rank} of {processes.count}, but accelerate takes part "
            f"as {obtained[0]} of {obtained[1]}"
        )
