"""The device a run uses, and what it can do; `integrations/choose.py` chooses one."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil
import torch

from tandem.errors import TandemError, UserError
from tandem.runtime.launch import launched

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# What carries gradients between processes; gloo elsewhere.
_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}
# Past this many rows, larger products gain nothing on CPU but leave the caches.
_CPU_ROWS = 2048
_GPU_ROWS = 32768


def most_resident() -> int:
    """Most bytes of memory that this process has held at once."""
    # ru_maxrss would count what the parent held when it started this process.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class BatchShapes(Protocol):
    """The shapes that every micro-batch of a run is filled up to."""

    def fill(self, batch: Any) -> Any:
        """The same micro-batch (`data.batching.collate.MicroBatch`) in one of the shapes."""
        ...


@dataclass(frozen=True)
class BatchRequest:
    """What a device may look at before it declares shapes.

    Attributes:
        data, held_out: the encoded records to train on and to score, None for no such records.
        sampler: which of `data` a step has (`data.batching.sampler.StepSampler`).
        max_length: tokens of a sequence.
        budget: tokens of a micro-batch, as the run would choose it.
        requested: the recipe's `tokens_per_microbatch`.
        log: takes lines for the console.
    """

    data: Any
    held_out: Any
    sampler: Any
    max_length: int
    budget: int
    requested: int | Literal["auto"]
    log: Callable[[str], None]


@dataclass(frozen=True)
class Device:
    """A resolved device; a subclass of another package may replace any of its methods.

    `weights` is the dtype of the frozen weights; adapters are float32 and, where the weights are
    narrower, work under autocast to `weights`.
    """

    torch_device: torch.device
    weights: torch.dtype

    @property
    def backend(self) -> str:
        """What carries gradients between processes on it: nccl, xccl or gloo."""
        return _BACKENDS.get(self.kind, "gloo")

    @property
    def kind(self) -> str:
        """The type that torch calls it by: cuda, xpu, mps or cpu."""
        return self.torch_device.type

    @property
    def dtype_name(self) -> str:
        """The name of `weights`, as recipes have it."""
        return str(self.weights).removeprefix("torch.")

    @property
    def autocast(self) -> torch.dtype | None:
        """What operations are cast to, None where weights are as wide as the adapters."""
        return self.weights if self.weights.itemsize < torch.float32.itemsize else None

    @property
    def sums(self) -> torch.dtype:
        """What log-probs are summed in: float64 where there is such a thing.

        MPS has none, and of Intel's GPUs the Arc A series has none.
        """
        if self.kind in ("cpu", "cuda"):
            return torch.float64
        if self.kind == "xpu" and torch.xpu.get_device_properties(self.torch_device).has_fp64:
            return torch.float64
        return torch.float32

    @property
    def is_host(self) -> bool:
        """Whether it is the processor itself, which has kernels and weight orders of its own."""
        return self.kind == "cpu"

    @property
    def graphs(self) -> str:
        """How operations become kernels on it, in a word: other graphs round differently."""
        return "torch"

    @property
    def free_shapes(self) -> bool:
        """Whether micro-batches of any shape may be met, not only declared ones."""
        return True

    @property
    def most_rows(self) -> int:
        """Rows beyond which a larger micro-batch gains nothing."""
        return _CPU_ROWS if self.is_host else _GPU_ROWS

    def attention(self, requested: str, model: Any) -> tuple[str, str] | None:
        """The attention backend that this device needs and why; None: any that fits the model.

        Args:
            requested: the recipe's attention.
            model: on the device, without an adapter.
        """
        del requested, model
        return None

    def optimizer(self, name: str) -> type[torch.optim.Optimizer] | None:
        """The device's own form of an optimizer; None: torch's."""
        del name
        return None

    def batch_shapes(self, request: BatchRequest) -> tuple[BatchShapes | None, int]:
        """The shapes that micro-batches are filled up to, None for any, and the token budget."""
        return None, request.budget

    def step_boundary(self) -> None:
        """Called after each backward and each optimizer step."""

    def synchronize(self) -> None:
        """Wait for the device's queued work, so that a clock means something."""
        if self.kind != "cpu":
            self._module.synchronize()

    def release_memory(self) -> None:
        """Give memory that is cached but not used back to the device."""
        empty = None if self.kind == "cpu" else getattr(self._module, "empty_cache", None)
        if empty is not None:
            empty()

    def free_memory(self) -> int:
        """Bytes that are free now; on CPU, this process's share of them."""
        if self.kind == "cpu":
            return int(psutil.virtual_memory().available) // launched().local_count
        if self.kind == "mps":
            held = torch.mps.driver_allocated_memory()
            return max(0, torch.mps.recommended_max_memory() - held)
        return int(self._module.mem_get_info(self.torch_device)[0])

    def peak_memory(self) -> int:
        """Most bytes this process has held at once: on CPU resident, elsewhere allocated.

        MPS keeps no record of its most; there it is what the driver holds now.
        """
        if self.kind == "cpu":
            return most_resident()
        if self.kind == "mps":
            return int(torch.mps.driver_allocated_memory())
        return int(self._module.max_memory_allocated(self.torch_device))

    def held_memory(self) -> int:
        """Bytes this process holds before a model is loaded, counted as `peak_memory` counts.

        Interpreter and libraries are in a CPU's memory and not in that of other devices.
        """
        return int(psutil.Process().memory_info().rss) if self.kind == "cpu" else 0

    @property
    def _module(self) -> Any:
        return getattr(torch, self.kind)


def unavailable_reason(kind: str) -> str | None:
    """What keeps a kind of device that torch itself knows from being used here, None: nothing."""
    reasons: dict[str, tuple[Callable[[], bool], str]] = {
        "cuda": (torch.cuda.is_available, "torch sees no CUDA device here (is it a CUDA build?)"),
        "xpu": (torch.xpu.is_available, "torch sees no Intel GPU here (is it an XPU build?)"),
        "mps": (torch.backends.mps.is_available, "torch sees no Metal device here"),
        "cpu": (lambda: True, ""),
    }
    available, reason = reasons[kind]
    return None if available() else reason


def numbered(kind: str) -> str:
    """The device of this process among those of its machine.

    Raises UserError for more processes than devices.
    """
    launch = launched()
    if kind == "cpu" or launch.count == 1:
        return kind
    if kind == "mps":
        raise UserError(
            f"{launch.count} processes were started, but torch has nothing that carries gradients "
            "between processes on MPS. Start one, or use device: cpu."
        )
    there = count_devices(kind)
    if there is not None and launch.local_count > there:
        raise UserError(
            f"{launch.local_count} processes were started on a machine with {there} "
            f"{kind.upper()} device{'s' if there != 1 else ''}; start one for each"
        )
    return f"{kind}:{launch.local_rank}"


def count_devices(device: str) -> int | None:
    """How many there are of a kind of which each process needs one of its own; None of others.

    Args:
        device: a recipe's; `auto` is the kind that would be taken.
    """
    if device == "auto":
        device = next((kind for kind in ("cuda", "xpu") if unavailable_reason(kind) is None), "cpu")
    if device not in ("cuda", "xpu"):
        return None
    return int(getattr(torch, device).device_count())


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a recipe's name, None for auto."""
    return None if name == "auto" else DTYPES[name]


_PRECISION_BACKENDS: Any = torch.backends


def exact_float32() -> None:
    """Turn TF32 and its like off for the process.

    On CUDA, TF32 rounds float32 operands to 10 bits: 1e-3 of a product, where a step in other
    micro-batches may differ by 1e-5. Under bfloat16 nothing that takes time is float32, so
    nothing is lost there. Products are set through torch's older interface, which sets the newer
    one as well, and convolutions through both: where the two disagree, torch raises whenever a
    library reads the older one.

    Raises TandemError if something keeps reduced precision on.
    """
    torch.set_float32_matmul_precision("highest")
    _PRECISION_BACKENDS.cudnn.allow_tf32 = False
    for kind in (_PRECISION_BACKENDS.cudnn.conv, _PRECISION_BACKENDS.cudnn.rnn):
        kind.fp32_precision = "ieee"
    if (found := float32_products()) != "ieee":
        raise TandemError(f"float32 products stay in reduced precision: {found}")


def float32_products() -> str:
    """What float32 products and convolutions are computed in: ieee, or what is reduced, and how."""
    found = {
        "cuda.matmul": _PRECISION_BACKENDS.cuda.matmul.fp32_precision,
        "cudnn.conv": _PRECISION_BACKENDS.cudnn.conv.fp32_precision,
        "mkldnn.matmul": _PRECISION_BACKENDS.mkldnn.matmul.fp32_precision,
    }
    reduced = [f"{name} {value}" for name, value in found.items() if value not in ("ieee", "none")]
    return ", ".join(reduced) or "ieee"
