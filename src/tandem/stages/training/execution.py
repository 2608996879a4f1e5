"""How a training stage computes: device, threads, token budget. It changes rounding alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from tandem.integrations.choose import choose_engine
from tandem.model.cpu.c_kernels import numerics
from tandem.model.cpu.onednn_linear import bytes_to_order
from tandem.model.elementwise import check_compile
from tandem.model.full.full_weights import check_full
from tandem.model.quantize import check_quantization
from tandem.recipe.jobs import TrainingJob
from tandem.runtime.device import Device, exact_float32, float32_products
from tandem.runtime.process_group import ProcessGroup
from tandem.stages.training.context import TrainContext
from tandem.storage.atomic_files import atomic_write_json
from tandem.storage.hashing import Damaged, read_object, sealed
from tandem.storage.manifest import difference
from tandem.train.engines.engine import Engine
from tandem.train.optimizers import check_optimizer
from tandem.train.token_budget import TokenBudget, token_budget

# Share of the free memory that copies of the frozen weights in a faster order may take.
_COPIES_SHARE = 0.25
# Values of executions that were recorded before these keys existed.
_ONCE = {
    "processes": 1, "kernels": "torch", "ordered_weights": False, "float32_products": "ieee",
    "compiled": False,
}  # fmt: skip

# How a run does its work, by name; the manifest's key for it is `schedule`.
Execution = dict[str, Any]


def start_engine(device: Device, processes: ProcessGroup, job: TrainingJob) -> Engine:
    """Start the engine of a job, without a model; UserError for settings that cannot work here."""
    run = job.run
    exact_float32()
    engine = choose_engine(run.engine, device, processes, job.settings)
    check_optimizer(job.settings.optimizer, engine.pieces, engine.name, device)
    check_quantization(run.quantization, device=device.kind, sharded=engine.sharded)
    if job.settings.full:
        check_full(quantization=run.quantization)
    check_compile(run.compile, device=device.kind, sharded=engine.sharded)
    return engine


def in_words(engine: Engine) -> str:
    """Say where a run computes."""
    count, kind = engine.processes.count, engine.device.kind
    place = f"{count} processes on {kind}" if count > 1 else kind
    return place if engine.name == "single" else f"{place} ({engine.name})"


def decide_execution(
    context: TrainContext, model: Any, backend: str, recorded: Execution
) -> Execution:
    """How a run does its work: as it began if it is resumed, unless the recipe says otherwise.

    The process with the least memory and the fewest threads decides for all. A line on the console
    says what differs from the recorded execution, which is empty in a new run. The model is on its
    device, without an adapter.
    """
    now = _execution_here(context, model, backend)
    if not recorded:
        return now
    now, changes = repeat_execution(recorded, now, context.job.run.tokens_per_microbatch)
    if changes:
        listing = ", ".join(f"{key} {old} -> {new}" for key, old, new in changes)
        context.log(
            f"resuming with another schedule ({listing}): the same steps, equal up to rounding "
            "instead of bit for bit"
        )
    return now


def _execution_here(context: TrainContext, model: Any, backend: str) -> Execution:
    """What a run that starts here and now does."""
    engine, run = context.engine, context.job.run
    device, processes = engine.device, engine.processes
    # Weights that are trained change, and their copies would not.
    fixed = not (engine.sharded or context.job.settings.full)
    copies = bytes_to_order(model) if fixed else 0
    by_rank = processes.gather(
        lambda: (
            token_budget(run.tokens_per_microbatch, device, context.base.config),
            torch.get_num_threads(),
            copies_fit(copies, device, device.free_memory()),
        )
    )
    budgets, threads, fits = zip(*by_rank, strict=True)
    return {
        "base": run.model,
        "tokens_per_microbatch": min(budgets),
        "threads": min(threads),
        "kernels": numerics() if device.is_host else device.graphs,
        "ordered_weights": all(fits),
        "processes": len(by_rank),
        "engine": engine.name,
        "device": device.kind,
        "attention": backend,
        "float32_products": float32_products(),
        "compiled": run.compile,
    }


def copies_fit(copies: int, device: Device, free: int) -> bool:
    """Whether `copies` bytes of weights in a faster order fit into a process's `free` memory."""
    return device.is_host and 0 < copies <= free * _COPIES_SHARE


def repeat_execution(
    recorded: Execution, now: Execution, requested: int | Literal["auto"]
) -> tuple[Execution, list[tuple[str, Any, Any]]]:
    """What a resumed run does, and what differs from the recorded execution: name, before, now."""
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
    engine: Engine, folder: Path, execution: Execution, log: Callable[[str], None]
) -> TokenBudget:
    """The execution's token budget, or less if the stage's folder remembers that less fits."""
    path, key = folder / "memory.json", "tokens_per_microbatch"
    fitting = engine.processes.on_rank0(lambda: _remembered(path, key, log))

    def remember(tokens: int) -> None:
        try:
            atomic_write_json(path, sealed({key: tokens}))
        except OSError as error:
            if engine.sharded:  # the next start would run out of memory again
                raise
            log(f"the smaller budget cannot be recorded for the next start ({error})")
        log(
            f"out of memory; continuing with {tokens} tokens a micro-batch, the steps stay the same"
        )

    tokens = execution[key] if fitting is None else min(execution[key], fitting)
    return TokenBudget(tokens, engine.device.release_memory, remember, alone=not engine.sharded)


def _remembered(path: Path, key: str, log: Callable[[str], None]) -> int | None:
    """The budget that a file remembers; None where there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        tokens: int = read_object(path, {key: int}, "What fits in memory is tried again.")[key]
    except Damaged as error:
        log(str(error))
        return None
    if tokens > 0:
        return tokens
    log(f"{path} is damaged ({key} is {tokens}): what fits in memory is tried again")
    return None
