"""Which device, number formats and token budget a run uses, and what they mean there."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

from tandem.errors import UserError
from tandem.train.launch import launched

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Share of the free memory that a micro-batch's activations may take.
_ACTIVATION_SHARE = 0.4
# Past this many rows, larger products gain nothing on CPU but leave the caches.
_CPU_ROWS = 2048
_GPU_ROWS = 32768


@dataclass(frozen=True)
class Device:
    """A resolved device.

    `weights` is the dtype of the frozen weights; adapters are float32 and, where the weights are
    narrower, work under autocast to `weights`.
    """

    torch_device: torch.device
    weights: torch.dtype

    @property
    def backend(self) -> str:
        """What carries gradients between processes on it."""
        return "nccl" if self.kind == "cuda" else "gloo"

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return self.torch_device.type

    def synchronize(self) -> None:
        """Wait for the device's queued work, so that a clock means something."""
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def release_memory(self) -> None:
        """Give memory that is cached but not used back to the device."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()

    def free_memory(self) -> int:
        """Bytes that are free now; on CPU, this process's share of them."""
        if self.kind == "cuda":
            return int(torch.cuda.mem_get_info(self.torch_device)[0])
        return int(psutil.virtual_memory().available) // launched().local_count

    def peak_memory(self) -> int:
        """Most bytes this process has held at once: on CPU resident, on CUDA allocated."""
        if self.kind == "cuda":
            return int(torch.cuda.max_memory_allocated(self.torch_device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def choose_device(device: str, dtype: str) -> Device:
    """Resolve `auto`; an explicit choice wins and fails when it is not there.

    Args:
        device: auto, cpu or cuda.
        dtype: auto, float32, bfloat16, float16 (float64 for tests).

    Raises UserError for a device this machine lacks.
    """
    kind = device
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device: cuda was asked for, but torch sees no CUDA device here. "
            "Use device: auto or cpu, or install a CUDA build of torch."
        )
    if dtype == "auto":
        # Without AMX, bfloat16 products are slower than float32 ones on CPUs.
        dtype = "bfloat16" if kind == "cuda" else "float32"
    launch = launched()
    if kind == "cuda" and launch.count > 1:
        there = torch.cuda.device_count()
        if launch.local_count > there:
            raise UserError(
                f"{launch.local_count} processes were started on a machine with {there} CUDA "
                f"device{'s' if there > 1 else ''}; start one for each"
            )
        kind = f"cuda:{launch.local_rank}"
    return Device(torch.device(kind), _DTYPES[dtype])


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


def token_budget(requested: int | Literal["auto"], device: Device, config: Any) -> int:
    """Tokens that a micro-batch should not exceed.

    `auto` divides a share of the free memory by an estimate of the activations a token keeps for
    the backward, bounded by what keeps the device busy.
    """
    if requested != "auto":
        return requested
    text = config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    # Residuals, norms, projections and adapters' inputs, and the gated MLP's products.
    per_token = layers * (16 * hidden + 5 * inner) * 4
    fitting = int(device.free_memory() * _ACTIVATION_SHARE / per_token)
    limit = _CPU_ROWS if device.kind == "cpu" else _GPU_ROWS
    return max(256, min(limit, fitting))
