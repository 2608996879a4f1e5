"""A run's measurements: taken in turns, checked against each other, kept as JSON."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tandem.storage.atomic_files import atomic_write_json, read_json

from .apart import SideError
from .roofline import Needed
from .work import Measured, Stage, Work

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "unsloth", "liger_kernel")
# Relative differences of a mean log-prob that the number format explains. Random weights give
# every token nearly the same log-prob, so a loose bound would notice nothing.
_FLOAT32, _BFLOAT16 = 2e-5, 5e-3


@dataclass(frozen=True)
class Environment:
    """Processor, threads and versions."""

    processor: str
    threads: int
    versions: str

    @classmethod
    def here(cls, threads: int, device: str = "cpu") -> Environment:
        """This process's."""
        from tandem import __version__

        packages = ", ".join(f"{name} {found}" for name in _PACKAGES if (found := _version(name)))
        python = platform.python_version()
        processor = torch.cuda.get_device_name() if device == "cuda" else _processor()
        return cls(processor, threads, f"tandem {__version__}, {packages}, Python {python}")


@dataclass(frozen=True)
class Task:
    """A side and how often it is measured."""

    work: Work
    repeats: int


@dataclass
class Record:
    """One run of a benchmark, complete or on its way.

    Attributes:
        settings: what was asked for; a run goes on only under the same.
        environment: what it runs on.
        needed: the operations of the whole data, where a roofline is drawn.
        rates: of each repeat, the product's rates by library.
        measured: of each side by name, one measurement a repeat.
        failed: why a side has none, by name.
    """

    settings: dict[str, Any]
    environment: Environment
    needed: Needed | None = None
    rates: list[dict[str, float]] = field(default_factory=list)
    measured: dict[str, list[Measured]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        atomic_write_json(path, asdict(self))


def load(path: Path) -> Record:
    """A record from its JSON."""
    found = read_json(path)
    return Record(
        settings=found["settings"],
        environment=Environment(**found["environment"]),
        needed=Needed(**found["needed"]) if found["needed"] else None,
        rates=found["rates"],
        measured={
            name: [Measured(**one | {"logps": tuple(one["logps"])}) for one in ones]
            for name, ones in found["measured"].items()
        },
        failed=found["failed"],
    )


def resumed(new: Record, path: Path) -> Record:
    """The record that was begun at `path`, or `new` where there is none.

    Raises SystemExit when the one begun is of other settings or another machine.
    """
    if not path.exists():
        return new
    begun = load(path)
    # As JSON gives it back, where tuples are lists.
    for name in ("settings", "environment"):
        one, other = getattr(begun, name), getattr(new, name)
        if one != other:
            raise SystemExit(
                f"{path} was begun with other {name}: {one}, now {other}. Leave --resume out to "
                "start over."
            )
    return begun


def take_turns(
    bench: Any, tasks: Sequence[Task], record: Record, scratch: Path, path: Path | None
) -> None:
    """Measure what the record lacks, repeat by repeat; it is saved to `path` on the way.

    A peer that fails on CUDA is noted and left out, because memory may not suffice and not all
    install; elsewhere it ends the run.
    """
    for repeat in range(max(task.repeats for task in tasks)):
        if len(record.rates) <= repeat:
            record.rates.append(bench.gemm_rates())
        # Whoever goes first meets another state of the machine each time.
        shift = repeat % len(tasks)
        for task in [*tasks[shift:], *tasks[:shift]]:
            name, done = task.work.name, record.measured.setdefault(task.work.name, [])
            if not len(done) <= repeat < task.repeats or name in record.failed:
                continue
            folder = scratch / f"{len(list(scratch.iterdir()))}"
            folder.mkdir()
            try:
                measured = bench.measure(replace(task.work, scratch=str(folder)))
                check(record.measured | {name: [*done, measured]}, task.work.stage)
            except SideError as failure:
                if task.work.device != "cuda" or task.work.side == "tandem":
                    raise SystemExit(f"{name} failed:\n{failure}") from failure
                record.failed[name] = _reason(str(failure))
                log(f"{name} failed: {failure}")
            else:
                done.append(measured)
                log(f"{repeat + 1}/{task.repeats} {name}: {measured.seconds:.1f} s")
            if path is not None:
                record.save(path)


def check(found: Mapping[str, Sequence[Measured]], stage: Stage) -> None:
    """Raise SideError unless all sides' first steps are the plain loop's: the same mathematics.

    DPO starts at ln 2 whatever the log-probs, so these are compared as well. A side whose first
    step is smaller is compared over its records alone.
    """
    anchors = [one.logps for ones in found.values() for one in ones if one.logps]
    for name, ones in found.items():
        for one in ones:
            tolerance = _BFLOAT16 if one.bfloat16 else _FLOAT32
            loss = math.log(2) if stage == "dpo" else -one.first_logp
            if not math.isclose(one.first_loss, loss, rel_tol=tolerance):
                raise SideError(f"{name}: the first step's loss is {one.first_loss}, not {loss}")
            count = one.first_records
            if not anchors or not 0 < count <= len(anchors[0]):
                continue
            expected = anchors[0][count - 1]
            if not math.isclose(one.first_logp, expected, rel_tol=tolerance):
                raise SideError(
                    f"{name}: in the first step a trained token's mean log-prob is "
                    f"{one.first_logp}, in the plain loop {expected}"
                )


def log(text: str) -> None:
    """Progress, apart from the tables."""
    print(text, file=sys.stderr, flush=True)


def _reason(failure: str) -> str:
    if "out of memory" in failure.lower():
        return "out of memory"
    return failure.strip().splitlines()[-1][:200]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
