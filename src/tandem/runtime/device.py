"""The device of a run, and its abilities; `integrations/choose.py` chooses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import psutil
import torch

from tandem.errors import TandemError, UserError
from tandem.runtime.host_memory import available_memory, most_resident
from tandem.runtime.launch import launched

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# torch's backends for gradients between processes; gloo elsewhere.
_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}
_CPU_ROWS = 2048  # larger products are no faster on a CPU, and do not fit the caches
_GPU_ROWS = 32768


class BatchShapes(Protocol):
    """The shapes that every micro-batch of a run is padded to."""

    def fill(self, batch: Any) -> Any:
        """Return the same micro-batch (`data.batching.collate.MicroBatch`) in one of the shapes."""
        ...


@dataclass(frozen=True)
class BatchRequest:
    """What a device may inspect before it declares shapes.

    `data` and `held_out` (or None) are encoded records, `sampler` chooses those of a step. `budget`
    is the tokens of a micro-batch that the run would choose, `requested` the recipe's.
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
    """A resolved device; a subclass of another package may override any method.

    `weights` is the dtype of the frozen weights. Adapters are float32, and under autocast to
    `weights` where that is narrower.
    """

    torch_device: torch.device
    weights: torch.dtype

    @property
    def backend(self) -> str:
        """torch's backend for gradients between processes: nccl, xccl or gloo."""
        return _BACKENDS.get(self.kind, "gloo")

    @property
    def kind(self) -> str:
        """torch's name of its type: cuda, xpu, mps or cpu."""
        return self.torch_device.type

    @property
    def dtype_name(self) -> str:
        """The recipes' name of `weights`."""
        return str(self.weights).removeprefix("torch.")

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of autocast; None where weights are as wide as the adapters."""
        return self.weights if self.weights.itemsize < torch.float32.itemsize else None

    @property
    def sums(self) -> torch.dtype:
        """The dtype of summed log-probs: float64 where the device has it (MPS and Arc A do not)."""
        wide = self.kind in ("cpu", "cuda") or (
            self.kind == "xpu" and torch.xpu.get_device_properties(self.torch_device).has_fp64
        )
        return torch.float64 if wide else torch.float32

    @property
    def is_host(self) -> bool:
        """Whether it is the CPU, which has its own kernels and orders of weights."""
        return self.kind == "cpu"

    @property
    def graphs(self) -> str:
        """How operations become kernels, in a word: other graphs round differently."""
        return "torch"

    @property
    def free_shapes(self) -> bool:
        """Whether micro-batches may have any shape, not only declared ones."""
        return True

    @property
    def most_rows(self) -> int:
        """Rows beyond which a larger micro-batch gains nothing."""
        return _CPU_ROWS if self.is_host else _GPU_ROWS

    def attention(self, requested: str, model: Any) -> tuple[str, str] | None:
        """Return the attention backend that this device needs and why; None: any that fits.

        `requested` is the recipe's; the model is on the device, without an adapter.
        """
        del requested, model
        return None

    def optimizer(self, name: str) -> type[torch.optim.Optimizer] | None:
        """Return the device's own class of an optimizer; None: torch's."""
        del name
        return None

    def batch_shapes(self, request: BatchRequest) -> tuple[BatchShapes | None, int]:
        """Return the shapes that micro-batches are padded to, if any, and the token budget."""
        return None, request.budget

    def step_boundary(self) -> None:
        """Do what the device needs after each backward and each optimizer step."""

    def synchronize(self) -> None:
        """Wait for the device's queued work, so that its time can be measured."""
        if self.kind != "cpu":
            self._module.synchronize()

    def release_memory(self) -> None:
        """Return cached, unused memory to the device."""
        empty = None if self.kind == "cpu" else getattr(self._module, "empty_cache", None)
        if empty is not None:
            empty()

    def free_memory(self) -> int:
        """Return the bytes that are free now; on CPU, this process's share of them."""
        if self.kind == "cpu":
            return available_memory() // launched().local_count
        if self.kind == "mps":
            allocated = torch.mps.driver_allocated_memory()
            return max(0, torch.mps.recommended_max_memory() - allocated)
        return int(self._module.mem_get_info(self.torch_device)[0])

    def peak_memory(self) -> int:
        """Return this process's peak memory in bytes: resident on a CPU, else allocated."""
        if self.kind == "cpu":
            return most_resident()
        if self.kind == "mps":
            return int(torch.mps.driver_allocated_memory())
        return int(self._module.max_memory_allocated(self.torch_device))

    def held_memory(self) -> int:
        """Return the bytes of interpreter and libraries that `peak_memory` counts."""
        return int(psutil.Process().memory_info().rss) if self.kind == "cpu" else 0

    @property
    def _module(self) -> Any:
        return getattr(torch, self.kind)


def unavailable_reason(kind: str) -> str | None:
    """Return why a kind of device that torch knows cannot be used here; None if it can."""
    reasons: dict[str, tuple[Callable[[], bool], str]] = {
        "cuda": (torch.cuda.is_available, "torch sees no CUDA device here (is it a CUDA build?)"),
        "xpu": (torch.xpu.is_available, "torch sees no Intel GPU here (is it an XPU build?)"),
        "mps": (torch.backends.mps.is_available, "torch sees no Metal device here"),
        "cpu": (lambda: True, ""),
    }
    available, reason = reasons[kind]
    return None if available() else reason


def numbered(kind: str) -> str:
    """Return the device of this process on its machine; raise UserError if there are too few."""
    launch = launched()
    if kind == "cpu" or launch.count == 1:
        return kind
    if kind == "mps":
        raise UserError(
            f"{launch.count} processes were started, but torch has nothing that carries gradients "
            "between processes on MPS. Start one, or use device: cpu."
        )
    devices = count_devices(kind)
    if devices is not None and launch.local_count > devices:
        raise UserError(
            f"{launch.local_count} processes were started on a machine with {devices} "
            f"{kind.upper()} device{'s' if devices != 1 else ''}; start one for each"
        )
    return f"{kind}:{launch.local_rank}"


def count_devices(device: str) -> int | None:
    """Return how many devices there are if each process needs its own, else None.

    `device` is a recipe's; `auto` stands for the kind that would be chosen.
    """
    if device == "auto":
        device = next((kind for kind in ("cuda", "xpu") if unavailable_reason(kind) is None), "cpu")
    if device not in ("cuda", "xpu"):
        return None
    return int(getattr(torch, device).device_count())


def torch_dtype(name: str) -> torch.dtype | None:
    """Return the torch dtype of a recipe's name, None for auto."""
    return None if name == "auto" else DTYPES[name]


_PRECISION_BACKENDS: Any = torch.backends


def exact_float32() -> None:
    """Turn TF32 and its like off for the process; raise TandemError if something keeps it on.

    On CUDA, TF32 rounds float32 operands to 10 bits: 1e-3 of a product, where a step in other
    micro-batches may differ by 1e-5. Under bfloat16 no slow operation is float32, so it costs no
    time there. Products are set through torch's older interface, which sets the newer one as well,
    and convolutions through both: where the two disagree, torch raises whenever a library reads the
    older one.
    """
    torch.set_float32_matmul_precision("highest")
    _PRECISION_BACKENDS.cudnn.allow_tf32 = False
    for kind in (_PRECISION_BACKENDS.cudnn.conv, _PRECISION_BACKENDS.cudnn.rnn):
        kind.fp32_precision = "ieee"
    if (precision := float32_products()) != "ieee":
        raise TandemError(f"float32 products stay in reduced precision: {precision}")


def float32_products() -> str:
    """Return the precision of float32 products and convolutions: ieee, or all reduced ones."""
    settings = {
        "cuda.matmul": _PRECISION_BACKENDS.cuda.matmul,
        "cudnn.conv": _PRECISION_BACKENDS.cudnn.conv,
        "mkldnn.matmul": _PRECISION_BACKENDS.mkldnn.matmul,
    }
    values = {name: setting.fp32_precision for name, setting in settings.items()}
    reduced = [f"{name} {value}" for name, value in values.items() if value not in ("ieee", "none")]
    return ", ".join(reduced) or "ieee"
