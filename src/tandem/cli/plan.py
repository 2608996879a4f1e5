"""`tandem plan RECIPE [key=value ...]`: what a run would do and take, before it starts."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tandem.cli.parser import Parser, add_overrides, positive
from tandem.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from tandem.plan.plan_recipe import Plan, StagePlan


def plan(argv: list[str]) -> int:
    """Print a recipe's plan, as tables or as JSON."""
    arguments = _parser().parse(argv)
    records, tokens = arguments.records or [], arguments.tokens_per_record or []
    if len(records) != len(tokens):
        raise UserError(
            "tandem plan: --records and --tokens-per-record go together; give both, with as many "
            "numbers"
        )
    from tandem.plan.available_data import Guess
    from tandem.plan.plan_recipe import plan_recipe
    from tandem.recipe.load_recipe import load_recipe
    from tandem.runtime.console import notice_console, result_console

    made = plan_recipe(
        load_recipe(arguments.recipe, arguments.overrides),
        processes=arguments.nproc or 1,
        download=arguments.download,
        guesses=[Guess(*pair) for pair in zip(records, tokens, strict=True)],
        console=notice_console(),
    )
    if arguments.json:
        print(json.dumps(as_json(made), indent=2, ensure_ascii=False))
    else:
        _show(made, result_console())
    return 0


def as_json(made: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    stages = []
    for one in made.trained:
        found: dict[str, Any] = {
            "name": one.name, "folder": str(one.folder), "records": one.ledger,
            "tokens_per_microbatch": one.budget, "notes": list(one.notes),
            "model": asdict(one.shape),
        }  # fmt: skip
        if one.forecast is not None and one.disk is not None:
            cast = one.forecast
            assert cast.rate is not None
            last = cast.rate.measured
            found |= {
                "work": asdict(cast.work),
                "operations": {
                    **asdict(cast.operations),
                    "reference_share": cast.operations.reference_share,
                },
                "memory": {
                    engine: {**asdict(memory), "peak": memory.peak}
                    for engine, memory in one.memory.items()
                },
                "engine": cast.setting.engine,
                "disk": asdict(one.disk),
                "seconds": cast.seconds,
                "reference_seconds": cast.reference_seconds,
                "rate": {
                    "operations_per_second": cast.rate.operations,
                    "from": cast.rate.source,
                    "last_run": None if last is None else {
                        "setting": asdict(last.setting), "actual_by_estimate": last.ratios
                    },
                },
            }  # fmt: skip
        stages.append(found)
    return {
        "device": made.device,
        "dtype": made.dtype,
        "processes": made.processes,
        "stages": [stage.name for stage in made.stages],
        "training": stages,
    }


def _show(made: Plan, console: Console) -> None:
    trained = {one.name: one for one in made.trained}
    count = f"{made.processes} processes" if made.processes > 1 else "1 process"
    console.print(f"planned for {made.device}, {made.dtype}, {count}; nothing was trained")
    for number, stage in enumerate(made.stages, start=1):
        console.print()
        console.rule(f"{number}/{len(made.stages)} {stage.name}: {stage.note}", align="left")
        if stage.name in trained:
            _show_stage(trained[stage.name], console)


def _show_stage(one: StagePlan, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(one):
        table.add_row(Text(name), Text(text))
    console.print(table)
    if len(one.memory) > 1:
        console.print(_by_engine(one))
    for note in one.notes:
        console.print(Text(f"  {note}", style="yellow"), soft_wrap=True)


def _rows(one: StagePlan) -> list[tuple[str, str]]:
    """Name and text of each line about a stage."""
    from tandem.wording import percent, short_count, size

    shape = one.shape
    rows = []
    if one.ledger is not None:
        counts = one.ledger
        rows.append(
            (
                "records",
                f"{counts['read']:,} read, {counts['trained']:,} trained, "
                f"{counts['truncated']:,} of them truncated, {counts['dropped']:,} dropped",
            )
        )
    rows.append(
        (
            "parameters",
            f"{shape.parameters:,}, trained {shape.trained:,} "
            f"({percent(shape.trained / shape.parameters, 2)}), "
            f"adapter on disk {size(4 * shape.trained)}",
        )
    )
    if one.forecast is None or one.disk is None:
        return rows
    work, operations = one.forecast.work, one.forecast.operations
    rows[-1:-1] = [
        ("steps", f"{work.steps:,}, {work.examples:,} examples"),
        (
            "tokens",
            f"{work.tokens:,} fed, {work.tokens_per_epoch:,} an epoch, "
            f"{work.tokens / work.steps:,.0f} a step",
        ),
        *_savings(one),
        ("micro-batches", _packing(one)),
    ]
    if operations.reference:
        rows.append(
            (
                "reference",
                f"{work.reference_tokens:,} tokens once, {percent(operations.reference_share)} of "
                "all operations; what the store has is not computed",
            )
        )
    parts = [f"forward {short_count(operations.forward)}",
             f"backward {short_count(operations.backward)}"]  # fmt: skip
    if operations.recomputed:
        parts.append(f"recomputed {short_count(operations.recomputed)}")
    if operations.reference:
        parts.append(f"reference {short_count(operations.reference)}")
    rows.append(("operations", f"{short_count(operations.total)}: {', '.join(parts)}"))
    rows.append((f"memory ({one.forecast.setting.engine})", _memory(one)))
    rows.append(
        (
            "disk",
            f"{one.disk.kept} checkpoint{'s' if one.disk.kept != 1 else ''} "
            f"{size(one.disk.checkpoints)}, merged model {size(one.disk.merged)}",
        )
    )
    return [*rows, *_time(one)]


def _savings(one: StagePlan) -> list[tuple[str, str]]:
    from tandem.wording import percent

    assert one.forecast is not None
    work = one.forecast.work
    if not work.padded_tokens or not work.packed_steps:
        return []
    unshared = work.tokens + work.shared_tokens
    found = [
        (
            "padding avoided",
            f"{percent(max(0.0, 1 - unshared / work.padded_tokens))} of the "
            f"{work.padded_tokens:,} tokens that batches of 8, padded, would feed",
        )
    ]
    if work.shared_tokens:
        found.append(
            (
                "sharing gained",
                f"{work.shared_tokens:,} tokens are not computed twice, "
                f"{percent(work.shared_tokens / unshared)} of {unshared:,}",
            )
        )
    return found


def _packing(one: StagePlan) -> str:
    from tandem.wording import percent

    assert one.forecast is not None
    work, processes = one.forecast.work, one.forecast.setting.processes
    text = f"{work.micro_batches:,} of {one.budget:,} tokens at most, {percent(work.fill)} full"
    if work.longest > one.budget:
        text += f" (the longest record has {work.longest:,} and is alone)"
    if processes > 1:
        text += f", the busiest of {processes} processes {work.imbalance - 1:.1%} above the mean"
    if 0 < work.packed_steps < work.steps:
        text += f", from {work.packed_steps} of the steps"
    return text


def _memory(one: StagePlan) -> str:
    from tandem.wording import size

    assert one.forecast is not None
    memory = one.forecast.memory
    parts = {
        "weights": memory.weights,
        "adapter": memory.adapter,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "head": memory.head,
        "process": memory.baseline,
    }
    listed = ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value)
    return f"about {size(memory.peak)} a process: {listed}"


def _time(one: StagePlan) -> list[tuple[str, str]]:
    from tandem.wording import duration

    assert one.forecast is not None
    cast = one.forecast
    if cast.rate is None or cast.seconds is None:
        return []
    text = f"about {duration(cast.seconds)}"
    if cast.reference_seconds:
        text += f", before it {duration(cast.reference_seconds)} for the reference"
    rows = [("time", f"{text}; from {cast.rate.source}")]
    if cast.rate.measured is not None:
        ratios = cast.rate.measured.ratios
        names = {"time": "seconds", "memory": "memory", "tokens": "tokens", "steps": "steps"}
        words = ", ".join(
            f"{name} {ratios[key]:.2f}x" for name, key in names.items() if key in ratios
        )
        rows.append(("last run", f"actual by estimate: {words}"))
    return rows


def _by_engine(one: StagePlan) -> Any:
    from rich.table import Table

    from tandem.wording import size

    table = Table(title="memory of one process by engine", title_justify="left", box=None)
    names = ("weights", "gradients", "optimizer", "activations", "peak")
    for name in ("engine", *names):
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    for engine, memory in one.memory.items():
        table.add_row(engine, *(size(getattr(memory, name)) for name in names))
    return table


def _parser() -> Parser:
    parser = Parser(
        prog="tandem plan",
        usage="tandem plan RECIPE [key=value ...] [--nproc N] [--json] [--download]\n"
        "                   [--records N[,N] --tokens-per-record M[,M]]",
        description="What a recipe's training would do and take: records, steps, tokens, padding "
        "avoided,\nprompts shared, operations, memory, disk and time. Needs the model's "
        "configuration and\ntokenizer, no weights. Data is read and encoded as training would, and "
        "found again by it.",
        unknown_hint=" (recipe keys are written key=value, without dashes)",
        epilog="example: tandem plan demo sft.batch_size=16 --nproc 2",
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="A shipped recipe's name or a YAML file.")
    add_overrides(parser, "Recipe keys")
    add("--nproc", metavar="N", type=positive, help="Plan for so many processes.")
    add("--json", action="store_true", help="Print JSON.")
    add("--download", action="store_true", help="Fetch data sets of the Hub, and read them.")
    add("--records", metavar="N[,N]", type=_numbers,
        help="Records of data that is not here, by training stage.")  # fmt: skip
    add("--tokens-per-record", metavar="M[,M]", type=_numbers, help="Tokens of each of them.")
    return parser


def _numbers(text: str) -> list[int]:
    """Positive numbers between commas."""
    return [positive(part) for part in text.split(",")]
