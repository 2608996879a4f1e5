"""How a training stage's work is done: none of it changes what is computed, beyond rounding."""

from __future__ import annotations

from typing import Any, Literal

import torch

from tandem.artifact.manifest import difference
from tandem.model.kernels.library import numerics
from tandem.model.products import bytes_to_order
from tandem.recipe.schema import Training
from tandem.train.device import Device, token_budget
from tandem.train.engine import Engine
from tandem.train.precision import float32_products
from tandem.train.strategies.deepspeed_config import Settled

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
    copies = 0 if engine.sharded else bytes_to_order(model)
    found = processes.exchange(
        lambda: (
            token_budget(requested, device, config),
            torch.get_num_threads(),
            device.is_host and 0 < copies <= device.free_memory() * _COPIES_SHARE / processes.count,
        )
    )
    return {
        "base": base,
        "tokens_per_microbatch": min(budget for budget, _, _ in found),
        "threads": min(threads for _, threads, _ in found),
        "kernels": numerics() if device.is_host else device.graphs,
        "ordered_weights": all(fits for _, _, fits in found),
        "processes": len(found),
        "engine": engine.strategy.name,
        "device": device.kind,
        "attention": backend,
        "float32_products": float32_products(),
        "compiled": compiled,
    }


def settled_by(settings: Training, device: Device, processes: int) -> Settled:
    """What the recipe says that a DeepSpeed file of the user's own may not contradict."""
    return Settled(
        batch_size=settings.batch_size,
        processes=processes,
        max_grad_norm=settings.max_grad_norm,
        dtype=str(device.weights).removeprefix("torch."),
        learning_rate=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        scheduler=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        max_steps=settings.max_steps,
    )


def repeat_schedule(
    recorded: dict[str, Any], now: dict[str, Any], requested: Budget
) -> tuple[dict[str, Any], list[tuple[str, Any, Any]]]:
    """What a resumed run does: what it began with, unless told otherwise.

    Returns the schedule and what differs from the recorded one: name, before, now.
    """
    recorded = {**_ONCE, **recorded}
    recorded.setdefault("engine", "single" if recorded["processes"] == 1 else "ddp")
    repeated = dict(now)
    if all(recorded[key] == now[key] for key in ("device", "processes", "engine")):
        repeated["threads"] = recorded["threads"]
        repeated["ordered_weights"] = recorded["ordered_weights"]
        if requested == "auto":
            repeated["tokens_per_microbatch"] = recorded["tokens_per_microbatch"]
    return repeated, difference(recorded, {**repeated, "base": recorded["base"]})
