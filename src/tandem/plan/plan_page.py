"""A plan on the terminal, and as plain values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tandem.plan.plan_recipe import Plan, TrainingPlan
from tandem.plan.stage_estimate import Memory, StageEstimate
from tandem.plan.workload import Operations, Workload
from tandem.wording import duration, percent, short_count, size

Row = tuple[str, str]
# Figures as they are shown, and their names in the record of runs.
_RATIOS = {"time": "seconds", "memory": "memory", "tokens": "tokens", "steps": "steps"}


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    return {
        "device": plan.device,
        "dtype": plan.dtype,
        "processes": plan.processes,
        "stages": [stage.name for stage in plan.stages],
        "training": [_stage_json(stage) for stage in plan.trained],
    }


def _stage_json(stage: TrainingPlan) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": stage.name, "folder": str(stage.folder), "records": stage.ledger,
        "tokens_per_microbatch": stage.budget, "notes": list(stage.notes),
        "model": asdict(stage.shape),
    }  # fmt: skip
    estimate = stage.estimate
    if estimate is None or estimate.rate is None or stage.disk is None:
        return values
    operations, rate = estimate.operations, estimate.rate
    last = rate.last_run
    return values | {
        "work": asdict(estimate.work),
        "operations": {**asdict(operations), "reference_share": operations.reference_share},
        "memory": {
            engine: {**asdict(memory), "peak": memory.peak}
            for engine, memory in stage.memory.items()
        },
        "engine": estimate.setting.engine,
        "disk": asdict(stage.disk),
        "seconds": estimate.seconds,
        "reference_seconds": estimate.reference_seconds,
        "rate": {
            "operations_per_second": rate.operations,
            "from": rate.source,
            "last_run": None if last is None else {
                "setting": asdict(last.setting), "actual_by_estimate": last.ratios
            },
        },
    }  # fmt: skip


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan: a table for each training stage, a line for each other one."""
    trained = {stage.name: stage for stage in plan.trained}
    count = f"{plan.processes} processes" if plan.processes > 1 else "1 process"
    console.print(f"planned for {plan.device}, {plan.dtype}, {count}; nothing was trained")
    for number, stage in enumerate(plan.stages, start=1):
        console.print()
        console.rule(f"{number}/{len(plan.stages)} {stage.name}: {stage.note}", align="left")
        if stage.name in trained:
            _show_stage(trained[stage.name], console)


def _show_stage(stage: TrainingPlan, console: Console) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(stage):
        table.add_row(Text(name), Text(text))
    console.print(table)
    if len(stage.memory) > 1:
        console.print(_by_engine(stage.memory))
    for note in stage.notes:
        console.print(Text(f"  {note}", style="yellow"), soft_wrap=True)


def _rows(stage: TrainingPlan) -> list[Row]:
    """Name and text of each line about a stage."""
    shape, counts = stage.shape, stage.ledger
    rows = []
    if counts is not None:
        text = (
            f"{counts['read']:,} read, {counts['trained']:,} trained, "
            f"{counts['truncated']:,} of them truncated, {counts['dropped']:,} dropped"
            + (f", {counts['split']:,} split at max_length" if "split" in counts else "")
        )
        rows.append(("records", text))
    parameters = (
        f"{shape.parameters:,}, trained {shape.trained:,} "
        f"({percent(shape.trained / shape.parameters, 2)})"
    )
    if not shape.full:
        parameters += f", adapter on disk {size(4 * shape.trained)}"
    estimate, disk = stage.estimate, stage.disk
    if estimate is None or disk is None:
        return [*rows, ("parameters", parameters)]
    kept = f"{disk.kept} checkpoint{'s' if disk.kept != 1 else ''} {size(disk.checkpoints)}"
    return [
        *rows,
        *_work_rows(estimate.work),
        ("micro-batches", _packing(estimate, stage.budget)),
        ("parameters", parameters),
        *_operation_rows(estimate.work, estimate.operations),
        (f"memory ({estimate.setting.engine})", _memory(estimate.memory)),
        ("disk", f"{kept}, merged model {size(disk.merged)}"),
        *_time_rows(estimate),
    ]


def _work_rows(work: Workload) -> list[Row]:
    each = f"{work.tokens_per_epoch:,} an epoch, {work.tokens / work.steps:,.0f} a step"
    rows = [
        ("steps", f"{work.steps:,}, {work.examples:,} examples"),
        ("tokens", f"{work.tokens:,} fed, {each}"),
    ]
    if not work.padded_tokens or not work.packed_steps:
        return rows
    unshared = work.tokens + work.shared_tokens
    padding = (
        f"{percent(max(0.0, 1 - unshared / work.padded_tokens))} of the "
        f"{work.padded_tokens:,} tokens that batches of 8, padded, would feed"
    )
    rows.append(("padding avoided", padding))
    if work.shared_tokens:
        sharing = (
            f"{work.shared_tokens:,} tokens are not computed twice, "
            f"{percent(work.shared_tokens / unshared)} of {unshared:,}"
        )
        rows.append(("sharing gained", sharing))
    return rows


def _packing(estimate: StageEstimate, budget: int) -> str:
    work, processes = estimate.work, estimate.setting.processes
    text = f"{work.micro_batches:,} of {budget:,} tokens at most, {percent(work.fill)} full"
    if work.longest > budget:
        text += f" (the longest record has {work.longest:,} and is alone)"
    if processes > 1:
        text += f", the busiest of {processes} processes {work.imbalance - 1:.1%} above the mean"
    if 0 < work.packed_steps < work.steps:
        text += f", from {work.packed_steps} of the steps"
    return text


def _operation_rows(work: Workload, operations: Operations) -> list[Row]:
    rows = []
    if operations.reference:
        text = (
            f"{work.reference_tokens:,} tokens once, {percent(operations.reference_share)} of "
            "all operations; log-probs that are in the store are not computed again"
        )
        rows.append(("reference", text))
    parts = ", ".join(
        f"{name} {short_count(value)}" for name, value in vars(operations).items() if value
    )
    return [*rows, ("operations", f"{short_count(operations.total)}: {parts}")]


def _memory(memory: Memory) -> str:
    parts = vars(memory) | {"process": memory.baseline}
    del parts["baseline"]
    listed = ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value)
    return f"about {size(memory.peak)} a process: {listed}"


def _time_rows(estimate: StageEstimate) -> list[Row]:
    rate = estimate.rate
    if rate is None or estimate.seconds is None:
        return []
    text = f"about {duration(estimate.seconds)}"
    if estimate.reference_seconds:
        text += f", before it {duration(estimate.reference_seconds)} for the reference"
    rows = [("time", f"{text}; from {rate.source}")]
    if rate.last_run is not None:
        ratios = rate.last_run.ratios
        words = ", ".join(f"{n} {ratios[key]:.2f}x" for n, key in _RATIOS.items() if key in ratios)
        rows.append(("last run", f"actual by estimate: {words}"))
    return rows


def _by_engine(memories: dict[str, Memory]) -> Table:
    table = Table(title="memory of one process by engine", title_justify="left", box=None)
    names = ("weights", "gradients", "optimizer", "activations", "peak")
    for name in ("engine", *names):
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for engine, memory in memories.items():
        table.add_row(engine, *(size(getattr(memory, name)) for name in names))
    return table
