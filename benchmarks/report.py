"""Measurements as a Markdown table, with what they were taken on."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from .work import Measured, Stage

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


@dataclass(frozen=True)
class Environment:
    """Processor, threads and versions."""

    processor: str
    threads: int
    versions: str

    @classmethod
    def here(cls, threads: int) -> Environment:
        """This process's."""
        from tandem import __version__

        packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
        python = platform.python_version()
        return cls(_processor(), threads, f"tandem {__version__}, {packages}, Python {python}")


@dataclass(frozen=True)
class Results:
    """All repeats of all sides of one stage, and what the roofline needs."""

    stage: Stage
    size: int
    batch_size: int
    repeats: int
    measured: dict[str, list[Measured]]
    operations: float
    gemm_rate: float


def markdown(results: Results, environment: Environment) -> str:
    """The table of a stage, the comparison with the best TRL, and the roofline."""
    sample = next(iter(results.measured.values()))[0]
    dpo = results.stage == "dpo"
    unit = "pairs" if dpo else "tokens"
    lines = [
        f"# {results.stage.upper()}, {results.size}M parameters",
        "",
        f"{sample.records} {'pairs' if dpo else 'conversations'} ({sample.tokens} tokens, nothing "
        f"shared), {results.batch_size} to a step; {_repeats(results.repeats)}. `python -m "
        f"benchmarks.training --stage {results.stage} --size {results.size} --repeats "
        f"{results.repeats} --{'pairs' if dpo else 'conversations'} {sample.records}`.",
        "",
        f"| side | {unit}/s |"
        + (" in the loop alone |" if dpo else "")
        + " tandem is faster by | peak memory |",
        "|---|---|" + ("---|" if dpo else "") + "---|---|",
        *(_row(name, results) for name in results.measured),
        "",
        *_targets(results),
        *_roofline(results),
        f"{environment.processor}, threads: {environment.threads}, float32. "
        f"{environment.versions}.",
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, results: Results) -> str:
    measured = results.measured[name]
    dpo = results.stage == "dpo"
    cells = [name, _spread(measured, _rate(dpo))]
    if dpo:
        cells.append(_spread(measured, lambda m: m.records / m.loop_seconds))
    ours = results.measured.get("tandem")
    own = median(map(_rate(dpo), measured))
    cells.append("-" if ours is None else f"{median(map(_rate(dpo), ours)) / own:.2f}x")
    peak = median(m.peak_bytes for m in measured)
    cells.append(f"{peak / 2**30:.1f} GiB")
    return f"| {' | '.join(cells)} |"


def _targets(results: Results) -> list[str]:
    rate = _rate(results.stage == "dpo")
    medians = {name: median(map(rate, found)) for name, found in results.measured.items()}
    peers = {name: value for name, value in medians.items() if name.startswith("TRL")}
    if "tandem" not in medians or not peers:
        return []
    best = max(peers, key=lambda name: peers[name])
    times = medians["tandem"] / peers[best]
    included = ", reference included on both sides" if results.stage == "dpo" else ""
    return [f"Against TRL's best ({best.removeprefix('TRL, ')}): {times:.2f}x{included}.", ""]


def _roofline(results: Results) -> list[str]:
    ours = results.measured.get("tandem")
    if ours is None:
        return []
    seconds = median(m.loop_seconds + m.reference_seconds for m in ours)
    rate = results.operations / seconds
    return [
        f"Roofline: {results.operations / 1e12:.3g} T operations are needed; tandem reached "
        f"{rate / 1e9:.1f} G/s, {rate / results.gemm_rate:.0%} of the best float32 product "
        f"({results.gemm_rate / 1e9:.1f} G/s).",
        "",
    ]


def _repeats(count: int) -> str:
    return f"medians of {count} (lowest to highest)" if count > 1 else "one run each"


def _rate(dpo: bool) -> Callable[[Measured], float]:
    def rate(measured: Measured) -> float:
        done = measured.records if dpo else measured.tokens
        return done / (measured.loop_seconds + measured.reference_seconds)

    return rate


def _spread(measured: list[Measured], value: Callable[[Measured], float]) -> str:
    values = sorted(map(value, measured))
    text = _number(median(values))
    if len(values) > 1:
        text += f" ({_number(values[0])} to {_number(values[-1])})"
    return text


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
