"""Stage 1: supervised fine-tuning on conversations, raw text or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.recipe.jobs import TrainingJob
from tandem.recipe.training_settings import SftSettings
from tandem.stages.training.context import BuiltObjective, ObjectiveInputs, TrainingStage
from tandem.stages.training.train_stage import train_stage
from tandem.train.callbacks.callback import Callback
from tandem.train.objectives.supervised import SupervisedObjective, probability_weighted


def run_sft(job: TrainingJob, console: Console, callbacks: Sequence[Callback] = ()) -> Path:
    """Fine-tune the job's model on conversations, raw text or tokens; see `train_stage`."""
    settings = job.settings
    assert isinstance(settings, SftSettings)
    stage = TrainingStage(
        "sft", "conversations", _objective, dropout=True, warnings=_warnings,
        of_token=probability_weighted if settings.loss == "dft" else None,
    )  # fmt: skip
    return train_stage(stage, job, console, callbacks)


def _objective(_: ObjectiveInputs) -> BuiltObjective:
    return BuiltObjective(SupervisedObjective())


def _warnings(metrics: list[dict[str, Any]]) -> list[str]:
    if len(metrics) > 1 and metrics[-1]["loss"] > metrics[0]["loss"]:
        first, last = metrics[0]["loss"], metrics[-1]["loss"]
        return [f"the loss rose from {first:.3f} to {last:.3f}: lower the learning rate"]
    return []
