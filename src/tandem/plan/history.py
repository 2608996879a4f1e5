"""How far off estimates were: a line for each finished training stage, kept in the cache folder.

A plan takes this machine's rate from it. Nothing but speed and memory of runs is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import isfinite, log2
from pathlib import Path
from typing import Any

from tandem.storage.atomic_files import append_jsonl, atomic_write_text
from tandem.storage.cache_folder import cache_folder

NAME = "estimates.jsonl"
# What is compared. All are of the whole stage; memory is one process's peak.
FIGURES = ("tokens", "steps", "memory", "seconds")
_KEPT = 200
# Seconds of training up to which a run is mostly its beginning.
_BRIEF = 10.0
# Factors of two in size beyond which a model is not alike.
_APART = 2
# What a damaged line leads to; thousands of brackets recurse.
_NO_LINE = (
    LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What a rate depends on.

    Attributes:
        stage: sft or dpo.
        device: its kind.
        dtype: of the weights.
        size: parameters of the model.
        processes: how many there are.
        engine: how they share the work.
    """

    stage: str
    device: str
    dtype: str
    size: int
    processes: int
    engine: str


@dataclass(frozen=True)
class Measured:
    """A finished stage: what was estimated before it began, and what came of it.

    Attributes:
        setting: where and what.
        operations: of training, as `operations.count_operations` counts them, if all processes
            had as many as the busiest one.
        estimated, actual: `FIGURES` each; seconds are only estimated where a rate was known.
        reference_operations, reference_seconds: of the pass before it, 0 where there was none, or
            its results were found in the store.
    """

    setting: Setting
    operations: float
    estimated: Mapping[str, float]
    actual: Mapping[str, float]
    reference_operations: float = 0.0
    reference_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Operations a second of training."""
        return self.operations / max(self.actual["seconds"], 1e-9)

    @property
    def brief(self) -> bool:
        """Whether it was too short to tell how fast a longer one goes."""
        return self.actual["seconds"] < _BRIEF

    @property
    def ratios(self) -> dict[str, float]:
        """Actual by estimated, where it was."""
        return {
            name: self.actual[name] / max(self.estimated[name], 1e-9)
            for name in FIGURES
            if name in self.estimated
        }


def remember(measured: Measured, path: Path | None = None) -> None:
    """Append a finished stage; the newest 200 stay. Raises OSError where that cannot be."""
    path = path or cache_folder() / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    append_jsonl(path, asdict(measured))
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if len(lines) > 2 * _KEPT:
        atomic_write_text(path, "".join(lines[-_KEPT:]))


def recall(setting: Setting, path: Path | None = None) -> Measured | None:
    """The finished stage whose rate says most about `setting`, None when there is none.

    It must be on the same kind of device, in the same dtype and at most two size classes (of a
    factor of two each) away. Among those the nearest size class counts first, then the same
    processes and engine, then that it was not a brief one, then the same stage, and of equals the
    last.
    """
    found = [one for one in _read(path) if _comparable(one, setting)]
    return min(reversed(found), key=lambda one: _distance(one, setting), default=None)


def _comparable(one: Measured, setting: Setting) -> bool:
    same = (one.setting.device, one.setting.dtype) == (setting.device, setting.dtype)
    return same and _apart(one.setting, setting) <= _APART


def _apart(one: Setting, other: Setting) -> int:
    """Size classes between two."""
    return abs(round(log2(max(1, one.size))) - round(log2(max(1, other.size))))


def _distance(measured: Measured, other: Setting) -> tuple[int, bool, bool, bool]:
    one = measured.setting
    shared = (one.processes, one.engine) != (other.processes, other.engine)
    return _apart(one, other), shared, measured.brief, one.stage != other.stage


def _read(path: Path | None) -> list[Measured]:
    """What the file holds; lines that cannot be read, by whatever wrote them, are passed over."""
    found = []
    with suppress(OSError):
        content = (path or cache_folder() / NAME).read_text(encoding="utf-8", errors="replace")
        for line in content.splitlines():
            with suppress(*_NO_LINE):
                found.append(_measured(json.loads(line)))
    return found


def _measured(line: Mapping[str, Any]) -> Measured:
    estimated = line["estimated"]
    setting = Setting(**line["setting"])
    if type(setting.size) is not int:
        raise TypeError("the size of a model is a whole number")
    measured = Measured(
        setting,
        float(line["operations"]),
        {name: float(estimated[name]) for name in FIGURES if name in estimated},
        {name: float(line["actual"][name]) for name in FIGURES},
        float(line.get("reference_operations", 0.0)),
        float(line.get("reference_seconds", 0.0)),
    )
    if not all(map(isfinite, (measured.operations, *measured.actual.values()))):
        raise ValueError("a figure is no number")
    return measured
