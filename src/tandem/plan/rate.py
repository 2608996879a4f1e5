"""How many operations a second this machine does: the last run's figure, else a timed product.

Each finished training stage leaves a line in the cache folder: the estimates, and what it took.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from tandem.runtime.device import Device
from tandem.storage.atomic_files import append_jsonl, atomic_write_text
from tandem.storage.cache_folder import cache_folder

NAME = "estimates.jsonl"
# Figures that are compared, of the whole stage; memory is one process's peak.
FIGURES = ("tokens", "steps", "memory", "seconds")
_KEPT = 200
# A model that is more than this many times larger or smaller trains at another rate.
_ALIKE = 4
# Errors of damaged lines; thousands of brackets recurse.
_NO_LINE = (
    LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip
# Share of a product's rate that training reaches: attention, norms and small products are slower.
_SHARE = 0.5
# Seconds that the timed products may take.
_SECONDS = 0.3
_SIZES = {"cpu": 768}
_LARGE = 4096


@dataclass(frozen=True)
class RateKey:
    """What a rate depends on."""

    stage: str  # sft or dpo
    device: str  # its kind
    dtype: str  # of the weights
    size: int  # parameters of the model
    processes: int
    engine: str

    def is_like(self, other: RateKey) -> bool:
        """Whether a rate holds for the other: all is equal but the stage, and sizes are similar."""
        one, two = ((key.device, key.dtype, key.processes, key.engine) for key in (self, other))
        small, large = sorted((max(1, self.size), max(1, other.size)))
        return one == two and large <= _ALIKE * small


@dataclass(frozen=True)
class Measured:
    """A finished stage: what was estimated before it began, and what it took."""

    setting: RateKey
    # of training, as `workload.count_operations` counts them, if all processes had as many as the
    # busiest one
    operations: float
    # `FIGURES` each; seconds are only estimated where a rate was known
    estimated: Mapping[str, float]
    actual: Mapping[str, float]
    # of the reference pass, 0 where there was none, or its results were found in the store
    reference_operations: float = 0.0
    reference_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Operations a second of training, all processes together."""
        return self.operations / max(self.actual["seconds"], 1e-9)

    @property
    def ratios(self) -> dict[str, float]:
        """Actual by estimated, where it was."""
        return {
            name: self.actual[name] / max(self.estimated[name], 1e-9)
            for name in FIGURES
            if name in self.estimated
        }


@dataclass(frozen=True)
class Rate:
    """Operations a second of one process in training, and the run that showed it, if one did."""

    operations: float
    last_run: Measured | None

    @property
    def source(self) -> str:
        """Where it is from, in words."""
        if self.last_run is None:
            return f"a timed matrix product, of whose rate training is taken to reach {_SHARE:.0%}"
        return f"the last {self.last_run.setting.stage} run of a similar model on this machine"


def remember(measured: Measured, path: Path | None = None) -> None:
    """Append a finished stage; the newest 200 stay. Raises OSError where that cannot be."""
    path = path or cache_folder() / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    append_jsonl(path, asdict(measured))
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if len(lines) > 2 * _KEPT:
        atomic_write_text(path, "".join(lines[-_KEPT:]))


def recorded_rate(key: RateKey, path: Path | None = None) -> Rate | None:
    """The rate of the last run that `RateKey.is_like` finds alike, in lines that can be read."""
    with suppress(OSError):
        content = (path or cache_folder() / NAME).read_text(encoding="utf-8", errors="replace")
        for line in reversed(content.splitlines()):
            with suppress(*_NO_LINE):
                measured = _measured(json.loads(line))
                if measured.setting.is_like(key):
                    return Rate(measured.rate / key.processes, measured)
    return None


def product_rate(device: Device) -> Rate:
    """The rate expected from a timed matrix product."""
    return Rate(_SHARE * timed_product(device), None)


def timed_product(device: Device) -> float:
    """Operations a second of the best of a few square products, in less than a second."""
    place = device.torch_device
    size = _SIZES.get(place.type, _LARGE)
    # The random state of a run must be the same whether its machine was timed or not.
    left = torch.full((size, size), 0.5, device=place, dtype=device.weights)
    best, began = 0.0, time.perf_counter()
    with torch.no_grad():
        for turn in range(50):
            device.synchronize()
            start = time.perf_counter()
            left @ left
            device.synchronize()
            now = time.perf_counter()
            if turn:  # the first loads the library
                best = max(best, 2 * size**3 / max(now - start, 1e-9))
            if now - began > _SECONDS and turn:
                break
    return best


def _measured(line: Mapping[str, Any]) -> Measured:
    estimated = line["estimated"]
    setting = RateKey(**line["setting"])
    if type(setting.size) is not int or type(setting.processes) is not int:
        raise TypeError("the size of a model and the number of processes are whole numbers")
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
