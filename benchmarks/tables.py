"""Records as Markdown and charts; `python -m benchmarks.report` makes them again from the JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .charts import speed_chart
from .record import Record, load
from .work import Measured

RESULTS = Path(__file__).resolve().parent / "results"
MARKS = ("<!-- from benchmarks/results -->", "<!-- end -->")


@dataclass(frozen=True)
class Comparison:
    """tandem against one rung: how many times its speed, and its share of the memory.

    `loop` is None where the peer has no loop without the reference, or the stage none.
    """

    rung: str
    label: str
    included: float
    loop: float | None
    memory: float


def comparisons(record: Record) -> list[Comparison]:
    """All rungs that were measured; a rung of several sides is the fastest of them.

    In the loop, that may be another side than with the reference included.
    """
    sides = record.settings["sides"]
    ours = record.measured.get("tandem")
    if not ours:
        return []
    found = []
    for rung, label, belongs in _RUNGS:
        names = [n for n in sides if belongs(sides[n]) and record.measured.get(n)]
        if not names:
            continue
        rates = {name: median(map(_rate(record), record.measured[name])) for name in names}
        loops = {
            name: median(map(_loop_rate(record), record.measured[name]))
            for name in names
            if record.settings["stage"] == "dpo" and not record.measured[name][0].live_reference
        }
        best = max(rates, key=lambda name: rates[name])
        peak = median(one.peak_bytes for one in record.measured[best])
        detail = f" ({best.partition(', ')[2]})" if len(names) > 1 or "best" in label else ""
        found.append(
            Comparison(
                rung=rung,
                label=label + detail,
                included=median(map(_rate(record), ours)) / rates[best],
                loop=median(map(_loop_rate(record), ours)) / max(loops.values()) if loops else None,
                memory=median(one.peak_bytes for one in ours) / peak,
            )
        )
    return found


_RUNGS: tuple[tuple[str, str, Callable[[dict[str, Any]], bool]], ...] = (
    ("default", "TRL, its defaults", lambda s: s["side"] == "trl-default"),
    ("best", "TRL at its best", lambda s: s["side"] in ("trl", "trl-packed")),
    ("packed", "TRL, packed", lambda s: s["side"] == "trl-packed"),
    ("liger", "TRL with Liger", lambda s: s["side"] == "trl-liger"),
    ("unsloth", "Unsloth", lambda s: s["side"] == "unsloth"),
    ("plain", "plain loop at its best", lambda s: s["side"] == "plain"),
    ("padded", "plain loop, 8 padded", lambda s: s["side"] == "plain" and s["size"] == 8),
)


def markdown(record: Record) -> str:
    """What was run, the rungs, every side, and the roofline."""
    settings = record.settings
    dpo = settings["stage"] == "dpo"
    unit = "pairs" if dpo else "conversations"
    lines = [
        f"# {settings['stage'].upper()}, {settings['model']}",
        "",
        f"{settings['records']} {unit} ({settings['tokens']} tokens, nothing shared), "
        f"{settings['batch_size']} to a step; medians of the runs stated, which took turns "
        f"(lowest to highest). `{settings['command']}`.",
        "",
        *_rungs(record),
        *_sides(record),
        *_fewer(record),
        *_second_run(record),
        *_roofline(record),
        f"{record.environment.processor}, threads: {record.environment.threads}, "
        f"{settings['dtype']}. {record.environment.versions}.",
    ]
    return "\n".join(lines) + "\n"


def _rungs(record: Record) -> list[str]:
    found = comparisons(record)
    if not found:
        return []
    dpo = record.settings["stage"] == "dpo"
    loop = "reference included | in the loop" if dpo else "speed"
    return [
        f"| tandem against | {loop} | peak memory |",
        "|---|---|---|---|" if dpo else "|---|---|---|",
        *(
            f"| {one.label} | {one.included:.2f}x |"
            + (f" {_times(one.loop)} |" if dpo else "")
            + f" {one.memory:.2f}x |"
            for one in found
        ),
        "",
    ]


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _sides(record: Record) -> list[str]:
    dpo = record.settings["stage"] == "dpo"
    head = ["side", "pairs/s" if dpo else "tokens/s"]
    head += ["in the loop alone", "tokens/s"] if dpo else []
    head += ["peak memory", "runs"]
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(_row(name, record, len(head)) for name in record.settings["sides"]),
        "",
    ]


def _row(name: str, record: Record, columns: int) -> str:
    measured = record.measured.get(name)
    if not measured:
        why = record.failed.get(name, "not measured")
        return f"| {name} |" + f" {why} |" * (columns - 1)
    cells = [name, _spread(measured, _rate(record))]
    if record.settings["stage"] == "dpo":
        live = measured[0].live_reference
        cells.append("-" if live else _spread(measured, _loop_rate(record)))
        cells.append(_spread(measured, lambda one: one.tokens / one.seconds))
    peak = median(one.peak_bytes for one in measured)
    cells += [f"{peak / 2**30:.1f} GiB", str(len(measured))]
    return f"| {' | '.join(cells)} |"


def _fewer(record: Record) -> list[str]:
    """Which sides saw fewer records."""
    settings = record.settings
    fewer = {n: s["records"] for n, s in settings["sides"].items() if s["records"]}
    if not fewer:
        return []
    told = "; ".join(f"{name}: {count}" for name, count in fewer.items())
    return [
        f"Measured on the first records of the epoch alone: {told}. Rates are those of records "
        "of the whole set's mean length.",
        "",
    ]


def _second_run(record: Record) -> list[str]:
    again = record.measured.get("tandem, second run")
    first = record.measured.get("tandem")
    if not again or not first:
        return []
    return [
        "Second run on the same data and reference weights, with another learning rate: 0 "
        "reference log-probs computed, "
        f"{median(one.reference_seconds for one in again):.2f} s to find them, where the first "
        f"run's pass takes {median(one.reference_seconds for one in first):.1f} s.",
        "",
    ]


def _roofline(record: Record) -> list[str]:
    ours, needed = record.measured.get("tandem"), record.needed
    if not ours or needed is None:
        return []
    rates = [max(rate.values()) for rate in record.rates]
    best = max(rates)
    library = max(record.rates, key=lambda rate: max(rate.values()))
    both = needed.loop + needed.reference
    whole, nearest = roofline_share(record, lambda one: one.seconds, both)
    lines = [
        f"Roofline: {both / 1e12:.3g} T operations are needed. tandem runs at **{whole:.0%}** of "
        f"the best {record.settings['dtype']} square product of this run "
        f"({best / 1e9:.1f} G/s, by {max(library, key=lambda way: library[way])}; before each "
        f"repeat {_number(min(rates) / 1e9)} to {_number(best / 1e9)}), {nearest:.0%} of the one "
        "measured just before each repeat.",
    ]
    if needed.reference:
        loop, _ = roofline_share(record, lambda one: one.loop_seconds, needed.loop)
        reference, _ = roofline_share(record, lambda one: one.reference_seconds, needed.reference)
        lines[0] += f" The loop alone: {loop:.0%}; the reference pass alone: {reference:.0%}."
    lines[0] += (
        f" The formula counts every token in every layer; {needed.avoidable / both:.1%} of it is "
        "for rows and gradients that no target needs."
    )
    return [*lines, ""]


def roofline_share(
    record: Record, seconds: Callable[[Measured], float], operations: float
) -> tuple[float, float]:
    """Share of the run's best rate, and of the rate just before each repeat, as medians."""
    ours = record.measured["tandem"]
    rates = [max(rate.values()) for rate in record.rates]
    best = operations / median(map(seconds, ours)) / max(rates)
    pairs = zip(ours, rates, strict=False)
    return best, median(operations / seconds(one) / rate for one, rate in pairs)


def readme_table(folder: Path = RESULTS) -> str | None:
    """The README's table: DPO and SFT of the 60M model; None before both were measured."""
    files = [folder / f"training-{stage}-60m.json" for stage in ("dpo", "sft")]
    if not all(file.exists() for file in files):
        return None
    dpo, sft = ({one.rung: one for one in comparisons(load(file))} for file in files)
    lines = [
        "| tandem against | DPO, reference included | DPO, in the loop | DPO, peak memory | SFT |",
        "| --- | --- | --- | --- | --- |",
    ]
    for rung, _, _ in _RUNGS:
        one, other = dpo.get(rung), sft.get(rung)
        label = {"best": "TRL at its best", "plain": "plain loop at its best"}.get(rung)
        label = label or (one or other or Comparison("", "", 0, 0, 0)).label
        if one or other:
            cells = [
                *([one.included, one.loop, one.memory] if one else [None] * 3),
                other.included if other else None,
            ]
            lines.append(f"| {label} | {' | '.join(map(_short, cells))} |")
    return "\n".join(lines)


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}x" if value >= 1 else f"{value:.2f}x"


def write(record: Record, file: Path) -> str:
    """The Markdown of a record, and beside it the chart; returns the Markdown."""
    text = markdown(record)
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    found = comparisons(record)
    if found:
        title = f"{record.settings['stage'].upper()}, {record.settings['model']}"
        rows = [(one.label, one.included, one.loop, one.memory) for one in found]
        file.with_suffix(".svg").write_text(speed_chart(title, rows), encoding="utf-8")
    return text


def _rate(record: Record) -> Callable[[Measured], float]:
    """Records a second of the whole set's mean length, or tokens a second in SFT."""
    return lambda one: one.tokens / one.seconds / _tokens_a_record(record)


def _loop_rate(record: Record) -> Callable[[Measured], float]:
    return lambda one: one.tokens / one.loop_seconds / _tokens_a_record(record)


def _tokens_a_record(record: Record) -> float:
    settings = record.settings
    return settings["tokens"] / settings["records"] if settings["stage"] == "dpo" else 1.0


def _spread(measured: Sequence[Measured], value: Callable[[Measured], float]) -> str:
    values = sorted(map(value, measured))
    text = _number(median(values))
    if len(values) > 1:
        text += f" ({_number(values[0])} to {_number(values[-1])})"
    return text


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
