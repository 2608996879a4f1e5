"""Norms and gated MLPs whose elementwise part takes one pass over memory instead of five.

A class of modules is only replaced after one of its modules, of the same width, gave on random rows
what the kernel gives: names and attributes alone would take Gemma's norm, which multiplies by
1 + weight, for Llama's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tandem.model.cpu.c_kernels import RmsNorm, SwiGlu, kernels, usable

_PROBE_ROWS = 3
_PROBE_TOLERANCE = 1e-5


def fuse_elementwise(model: nn.Module) -> None:
    """Send RMS norms and SiLU-gated MLPs through the kernels where these can take them.

    Modules stay in place under their names, only their forward is replaced, and what the kernels
    do not take (other devices and number formats) goes the old way.
    """
    verdicts: dict[tuple[type, int], bool] = {}
    for module in model.modules():
        fused = _fused_forward(module)
        if fused is None or "forward" in module.__dict__:
            continue
        # What the kernels take depends on the width.
        kind = type(module), _weight(module).shape[-1]
        if kind not in verdicts:
            verdicts[kind] = _agree(module, fused)
        if verdicts[kind]:
            module.forward = fused


def _fused_forward(module: nn.Module) -> Any:
    if type(module).__name__.endswith("RMSNorm") and epsilon_of(module) is not None:
        return partial(_norm, module, module.forward)
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    if silu and all(isinstance(part, nn.Linear) for part in parts):
        return partial(_mlp, module, module.forward)
    return None


def _norm(module: Any, plain: Any, hidden: Tensor) -> Tensor:
    weight = module.weight
    library = kernels()
    if weight.requires_grad or not usable(library, hidden, weight):
        result: Tensor = plain(hidden)
        return result
    normed: Tensor = RmsNorm.apply(library, hidden, weight, epsilon_of(module))
    return normed


def _mlp(module: Any, plain: Any, hidden: Tensor) -> Tensor:
    library = kernels()
    if not usable(library, hidden):
        result: Tensor = plain(hidden)
        return result
    gated = SwiGlu.apply(library, module.gate_proj(hidden), module.up_proj(hidden))
    down: Tensor = module.down_proj(gated)
    return down


def epsilon_of(module: nn.Module) -> float | None:
    """A norm's epsilon, None for a module that is no norm with a weight and one."""
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(found) if isinstance(found, float) and hasattr(module, "weight") else None


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight if hasattr(module, "weight") else module.gate_proj.weight
    return weight


def _agree(module: nn.Module, fused: Any) -> bool:
    """Whether a module and its fused form give the same for a few random rows.

    Only where the fused form takes the kernel: on the old way a module would agree with itself.
    """
    weight = _weight(module)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, _PROBE_ROWS, weight.shape[-1], generator=generator)
    if not usable(kernels(), rows, weight):
        return False
    trained = weight.requires_grad
    weight.requires_grad_(False)
    with torch.no_grad():
        wanted, found = module(rows), fused(rows)
    weight.requires_grad_(trained)
    return bool(torch.allclose(found, wanted, rtol=_PROBE_TOLERANCE, atol=_PROBE_TOLERANCE))
