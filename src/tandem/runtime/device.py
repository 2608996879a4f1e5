"""The device a run uses: the only place that tells vendors apart, kernels in `model` aside."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from tandem.errors import TandemError, UserError
from tandem.integrations.gaudi import bridge
from tandem.integrations.gaudi.attention import fused_kernel
from tandem.recipe.run_settings import HpuSettings
from tandem.runtime.launch import launched

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# What carries gradients between processes; gloo elsewhere.
_BACKENDS = {"hpu": "hccl", "cuda": "nccl", "xpu": "xccl"}
# In this order `auto` takes the first that is there.
_AUTO = ("hpu", "cuda", "xpu", "mps", "cpu")
# Without AMX, bfloat16 products are slower than float32 ones on CPUs.
_HALF_BY_DEFAULT = ("hpu", "cuda", "xpu")
# Share of the free memory that a micro-batch's activations may take.
_ACTIVATION_SHARE = 0.4
# Past this many rows, larger products gain nothing on CPU but leave the caches.
_CPU_ROWS = 2048
_GPU_ROWS = 32768
# Where attention runs under an explicit mask, its scores grow with the square of the rows.
_MASKED_ROWS = 4096


def most_resident() -> int:
    """Most bytes of memory that this process has held at once."""
    # ru_maxrss would count what the parent held when it started this process.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Device:
    """A resolved device.

    `weights` is the dtype of the frozen weights; adapters are float32 and, where the weights are
    narrower, work under autocast to `weights`. `lazy` is Gaudi's lazy mode, `fused_adamw` and
    `fused_attention` whether Habana's own kernels were asked for, and are there.
    """

    torch_device: torch.device
    weights: torch.dtype
    lazy: bool = False
    fused_adamw: bool = False
    fused_attention: bool = False

    @property
    def backend(self) -> str:
        """What carries gradients between processes on it: hccl, nccl, xccl or gloo."""
        return _BACKENDS.get(self.kind, "gloo")

    @property
    def kind(self) -> str:
        """hpu, cuda, xpu, mps or cpu."""
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

        MPS and Gaudi have none, and of Intel's GPUs the Arc A series has none.
        """
        if self.kind in ("cpu", "cuda"):
            return torch.float64
        if self.kind == "xpu" and torch.xpu.get_device_properties(self.torch_device).has_fp64:
            return torch.float64
        return torch.float32

    @property
    def static_shapes(self) -> bool:
        """Whether every new shape compiles a graph, so that only declared ones may be met."""
        return self.kind == "hpu"

    @property
    def is_host(self) -> bool:
        """Whether it is the processor itself, which has kernels and weight orders of its own."""
        return self.kind == "cpu"

    @property
    def adamw(self) -> type[torch.optim.Optimizer]:
        """The AdamW that steps on it."""
        found: type[torch.optim.Optimizer] = (
            bridge.fused_adamw() if self.fused_adamw else torch.optim.AdamW
        )
        return found

    @property
    def graphs(self) -> str:
        """How operations become kernels on it, in a word: other graphs round differently."""
        return "torch, lazy graphs" if self.lazy else "torch"

    def step_boundary(self) -> None:
        """After each backward and each optimizer step: in lazy mode, launch what was gathered."""
        if self.lazy:
            bridge.mark_step()

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


def choose_device(device: str, dtype: str, hpu: HpuSettings | None = None) -> Device:
    """Resolve `auto`; an explicit choice wins and fails when it is not there.

    Args:
        device: auto, cpu, cuda, hpu, xpu or mps.
        dtype: auto, float32, bfloat16, float16 (float64 for tests).
        hpu: the mode that Gaudi cards run in, and the kernels of Habana's that are asked for; None
            takes the mode that is set, and none of the kernels.

    Raises UserError with the reason for a device this machine lacks, for a dtype that it lacks,
    and for more processes than it has.
    """
    lazy = None if hpu is None else hpu.lazy_mode
    kind = device
    if device == "auto":
        kind = next(k for k in _AUTO if _why_not(k, lazy) is None)
    elif reason := _why_not(device, lazy):
        raise UserError(f"device: {device} was asked for, but {reason}. Use device: auto or cpu.")
    if dtype == "auto":
        dtype = "bfloat16" if kind in _HALF_BY_DEFAULT else "float32"
    # transformers imports DeepSpeed where it is installed, which would look for a device by itself.
    os.environ.setdefault("DS_ACCELERATOR", kind)
    chosen = Device(torch.device(_numbered(kind)), _DTYPES[dtype])
    if chosen.weights == torch.float64 and chosen.sums != torch.float64:
        raise UserError(f"dtype: float64 does not exist on {kind}; use device: cpu")
    return _with_kernels(chosen, hpu or HpuSettings()) if kind == "hpu" else chosen


def _with_kernels(device: Device, hpu: HpuSettings) -> Device:
    """A Gaudi card with what its section asks for; raises UserError for what is missing."""
    if hpu.fused_optimizer:
        bridge.fused_adamw()
    if hpu.fused_attention:
        fused_kernel()
    return replace(
        device,
        lazy=bridge.lazy_mode(),
        fused_adamw=hpu.fused_optimizer,
        fused_attention=hpu.fused_attention,
    )


def _why_not(kind: str, lazy: bool | None) -> str | None:
    """What keeps a kind of device from being used here, None if nothing does."""
    if kind == "hpu":
        if not bridge.bridge_installed():
            return "Habana's bridge (habana_frameworks) is not installed; its containers have it"
        bridge.load_bridge(lazy=lazy)
        there = hasattr(torch, "hpu") and torch.hpu.is_available()
        return None if there else "the bridge sees no Gaudi card here"
    found: dict[str, tuple[Callable[[], bool], str]] = {
        "cuda": (torch.cuda.is_available, "torch sees no CUDA device here (is it a CUDA build?)"),
        "xpu": (torch.xpu.is_available, "torch sees no Intel GPU here (is it an XPU build?)"),
        "mps": (torch.backends.mps.is_available, "torch sees no Metal device here"),
        "cpu": (lambda: True, ""),
    }
    available, reason = found[kind]
    return None if available() else reason


def _numbered(kind: str) -> str:
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
    if kind == "hpu":  # the bridge gives each process a card of its own, always the current one
        return kind
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
        device = next((kind for kind in ("cuda", "xpu") if _why_not(kind, None) is None), "cpu")
    if device not in ("cuda", "xpu"):
        return None
    return int(getattr(torch, device).device_count())


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a recipe's name, None for auto."""
    return None if name == "auto" else _DTYPES[name]


def attention_weight(config: Any) -> float:
    """What attention over one visible pair of tokens costs, by all that a token costs elsewhere.

    Two products of hidden size each, by the multiplications of a layer's projections and gated
    MLP. Only balance depends on it, never a result.
    """
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:  # a model without attention
        return 0.0
    kept = int(getattr(text, "num_key_value_heads", None) or heads) / heads
    return 2 * hidden / ((2 + 2 * kept) * hidden**2 + 3 * hidden * inner)


def activation_bytes(config: Any) -> int:
    """An estimate of what a token keeps for the backward, in float32, all layers together."""
    text = config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    # Residuals, norms, projections and adapters' inputs, and the gated MLP's products.
    return layers * (16 * hidden + 5 * inner) * 4


def token_budget(
    requested: int | Literal["auto"], device: Device, config: Any, free: int | None = None
) -> int:
    """Tokens that a micro-batch should not exceed.

    `auto` divides a share of the free memory by an estimate of the activations a token keeps for
    the backward, bounded by what keeps the device busy. `free` is what is taken for free memory,
    in place of what is free now.
    """
    if requested != "auto":
        return requested
    if free is None:
        free = device.free_memory()
    fitting = int(free * _ACTIVATION_SHARE / activation_bytes(config))
    limit = _CPU_ROWS if device.kind == "cpu" else _GPU_ROWS
    if device.static_shapes:
        limit = _MASKED_ROWS
    return max(256, min(limit, fitting))


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
