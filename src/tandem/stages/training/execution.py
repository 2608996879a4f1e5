"""How a training stage's work is done: none of it changes what is computed, beyond rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from tandem.model.cpu.c_kernels import numerics
from tandem.model.cpu.onednn_linear import bytes_to_order
from tandem.runtime.device import Device, float32_products
from tandem.storage.atomic_files import atomic_write_json
from tandem.storage.hashing import Damaged, read_object, sealed
from tandem.storage.manifest import difference
from tandem.train.engines.engine import Engine
from tandem.train.token_budget import TokenBudget, token_budget

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
    found = processes.gather(
        lambda: (
            token_budget(requested, device, config),
            torch.get_num_threads(),
            copies_fit(copies, device, device.free_memory()),
        )
    )
    return {
        "base": base,
        "tokens_per_microbatch": min(budget for budget, _, _ in found),
        "threads": min(threads for _, threads, _ in found),
        "kernels": numerics() if device.is_host else device.graphs,
        "ordered_weights": all(fits for _, _, fits in found),
        "processes": len(found),
        "engine": engine.name,
        "device": device.kind,
        "attention": backend,
        "float32_products": float32_products(),
        "compiled": compiled,
    }


def copies_fit(copies: int, device: Device, free: int) -> bool:
    """Whether frozen weights are kept in a faster order as well.

    Args:
        copies: what that would take, in bytes.
        device: where.
        free: a process's share of the memory that is free.
    """
    return device.is_host and 0 < copies <= free * _COPIES_SHARE


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


def token_budget_of(
    engine: Engine, folder: Path, schedule: dict[str, Any], log: Callable[[str], None]
) -> TokenBudget:
    """The schedule's token budget, or less if more did not fit in memory before.

    Args:
        engine: knows the other processes.
        folder: the stage's, which remembers a smaller budget.
        schedule: resolved.
        log: told when the budget gets smaller.
    """
    path, key = folder / "memory.json", "tokens_per_microbatch"
    fitting = engine.processes.on_rank0(lambda: _remembered(path, key, log))

    def remember(tokens: int) -> None:
        try:
            atomic_write_json(path, sealed({key: tokens}))
        except OSError as error:
            if engine.sharded:  # the start that goes on would run out of memory again
                raise
            log(f"what fits in memory cannot be kept for the next start ({error})")
        log(f"out of memory; going on with {tokens} tokens a micro-batch, the steps stay the same")

    tokens = schedule[key] if fitting is None else min(schedule[key], fitting)
    return TokenBudget(tokens, engine.device.release_memory, remember, alone=not engine.sharded)


def _remembered(path: Path, key: str, log: Callable[[str], None]) -> int | None:
    """The budget that a file remembers; None where there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        found: int = read_object(path, {key: int}, "What fits in memory is tried again.")[key]
    except Damaged as error:
        log(str(error))
        return None
    if found > 0:
        return found
    log(f"{path} is damaged ({key} is {found}): what fits in memory is tried again")
    return None
