"""What functions of the user's own are told while a stage trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

EventKind = Literal["step", "scores", "checkpoint", "end"]


@dataclass(frozen=True)
class TrainingEvent:
    """One thing that happened: a logged step, held-out scores, a checkpoint, or the end."""

    kind: EventKind
    stage: str  # sft or dpo
    step: int  # finished optimizer steps
    total: int  # of the whole stage
    epoch: float  # epochs done, the last one in part
    # of a step or of scores: the line of metrics.jsonl or of validation.jsonl; of the end:
    # summary.json; of a checkpoint: empty
    metrics: Mapping[str, object]
    folder: Path  # the stage's
    checkpoint: Path | None = None  # the newest one's folder, once there is one
