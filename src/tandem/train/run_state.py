"""Where a training run stands, and the lines of metrics that belong to it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from tandem.storage.atomic_files import atomic_write_text


@dataclass
class RunState:
    """Where a training run stands; everything beside the tensors that a resume needs.

    `step` is the number of finished optimizer steps, `sums` runs since the last logged step; the
    rest is what the summary reports at the end. `padded_tokens` counts what padded batches of a
    usual size would have fed, `shared_tokens` what sharing prefixes saved; `fill` and `imbalance`
    sum up each step's, see `data.packing.StepPlan`. `best_step` is the step whose adapter scored
    best on held-out records so far, `best` its score.
    """

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    shared_tokens: int = 0
    micro_batches: int = 0
    fill: float = 0.0
    imbalance: float = 0.0
    validation_seconds: float = 0.0
    best_step: int | None = None
    best: float | None = None


def forget_after(path: Path, step: int) -> None:
    """Remove the lines of later steps from a file of metrics, and those that are damaged."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")[:-1]
    kept = b"".join(line + b"\n" for line in lines if _step_in(line) <= step)
    atomic_write_text(path, kept.decode())


def _step_in(line: bytes) -> float:
    """The step of a line of metrics; beyond all others where it cannot be told."""
    try:
        match json.loads(line.decode()):
            case {"step": int(step)}:
                return step
    except (ValueError, RecursionError):
        pass
    return math.inf
