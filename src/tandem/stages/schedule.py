"""How a training stage's work is done: none of it changes what is computed, beyond rounding."""

from __future__ import annotations

from typing import Any, Literal

import torch

from tandem.artifact.manifest import difference
from tandem.model.kernels.library import numerics
from tandem.model.products import bytes_to_order
from tandem.train.device import token_budget
from tandem.train.engine import Engine
from tandem.train.precision import float32_products

# Of the free memory, what copies of the frozen weights in a faster order may take.
_COPIES_SHARE = 0.25
# What a schedule that was recorded before these were known had.
_ONCE = {
    "processes": 1,
    "kernels": "torch",
    "ordered_weights": False,
    "float32_products": "ieee",
    "compiled": False,
}

Budget = int | Literal["auto"]


def resolve_schedule(
    engine: Engine,
    model: Any,
    config: Any,
    *,
    requested: Budget,
    backend: str,
    base: str,
    compiled: bool = False,
) -> dict[str, Any]:
    """What a run that starts here and now does.

    The process with the least memory and the fewest threads says what all do.

    Args:
        engine: knows the device and the other processes.
        model: loaded, on its device, without an adapter.
        config: the model's transformers configuration.
        requested: tokens_per_microbatch of the recipe.
        backend: the attention backend.
        base: what the run calls the model.
        compiled: whether torch.compile takes norms and gated MLPs.
    """
    device, processes = engine.device, engine.processes
    copies = bytes_to_order(model)
    found = processes.exchange(
        lambda: (
            token_budget(requested, device, config),
            torch.get_num_threads(),
            0 < copies <= device.free_memory() * _COPIES_SHARE / processes.count,
        )
    )
    return {
        "base": base,
        "tokens_per_microbatch": min(budget for budget, _, _ in found),
        "threads": min(threads for _, threads, _ in found),
        "kernels": numerics() if device.kind == "cpu" else "torch",
        "ordered_weights": all(fits for _, _, fits in found),
        "processes": len(found),
        "device": device.kind,
        "attention": backend,
        "float32_products": float32_products(),
        "compiled": compiled,
    }


def repeat_schedule(
    recorded: dict[str, Any], now: dict[str, Any], requested: Budget
) -> tuple[dict[str, Any], list[tuple[str, Any, Any]]]:
    """What a resumed run does: what it began with, unless told otherwise.

    Returns the schedule and what differs from the recorded one: name, before, now.
    """
    recorded = {**_ONCE, **recorded}
    repeated = dict(now)
    if (recorded["device"], recorded["processes"]) == (now["device"], now["processes"]):
        repeated["threads"] = recorded["threads"]
        repeated["ordered_weights"] = recorded["ordered_weights"]
        if requested == "auto":
            repeated["tokens_per_microbatch"] = recorded["tokens_per_microbatch"]
    return repeated, difference(recorded, {**repeated, "base": recorded["base"]})
