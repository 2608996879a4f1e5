"""What a recipe or a command line says about machines; only formats change what is computed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True)
class HpuSettings:
    """What only Gaudi cards heed.

    Attributes:
        lazy_mode: graphs are gathered and launched at step boundaries, instead of eagerly.
        buckets: lengths in tokens that micro-batches are filled up to, so that only so many shapes
            are compiled; `max`: one length, which holds the longest.
        fused_attention, fused_optimizer: Habana's own kernels.
    """

    lazy_mode: bool = False
    buckets: tuple[int, ...] | Literal["auto", "max"] = "auto"
    fused_attention: bool = False
    fused_optimizer: bool = False


@dataclass(frozen=True)
class Runtime:
    """Where and how a run computes; `auto` is resolved when it starts.

    Attributes:
        device, dtype, attention, tokens_per_microbatch, engine: the recipe's keys of these names.
        timeout_minutes: how long a process waits for the others.
        quantization: number format of the frozen base, None for `dtype`.
        compile: whether torch.compile takes norms and gated MLPs.
        hpu: what only Gaudi cards heed.
    """

    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    tokens_per_microbatch: int | Literal["auto"] = "auto"
    engine: str = "auto"
    timeout_minutes: int = 60
    quantization: str | None = None
    compile: bool = False
    hpu: HpuSettings = HpuSettings()


def runtime_of(source: Any, **changes: Any) -> Runtime:
    """The runtime that a recipe or a command line asks for.

    Args:
        source: has an attribute for each of the runtime's fields, `hpu` with its own.
        changes: fields that are not as the source says.
    """
    values = {field.name: getattr(source, field.name) for field in fields(Runtime)} | changes
    hpu = {field.name: getattr(source.hpu, field.name) for field in fields(HpuSettings)}
    return Runtime(**{**values, "hpu": HpuSettings(**hpu)})
