"""Stage 1: supervised fine-tuning of a LoRA adapter on conversations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.build_dataset import prepare_conversations
from tandem.recipe.run_settings import Runtime
from tandem.recipe.training_settings import SftSettings
from tandem.stages.training.context import Made, StageKind, Start
from tandem.stages.training.train_stage import run_training
from tandem.train.losses.objectives import SupervisedObjective


def run_sft(
    *,
    model: str,
    revision: str | None,
    settings: SftSettings,
    output_dir: Path,
    chat_template: str | None,
    seed: int,
    runtime: Runtime,
    console: Console,
    added_tokens: Sequence[str] = (),
) -> Path:
    """Fine-tune `model` on conversations; the folder is a peft adapter at its root.

    See `training.run_training` for what is resumed, recognised and refused.
    """
    prepare = partial(prepare_conversations, loss_on=settings.loss_on)
    kind = StageKind("sft", prepare, _objective, dropout=True, warnings=_warnings)
    return run_training(
        kind,
        model=model,
        revision=revision,
        settings=settings,
        output_dir=output_dir,
        chat_template=chat_template,
        seed=seed,
        runtime=runtime,
        console=console,
        added_tokens=added_tokens,
    )


def _objective(_: Start) -> Made:
    return Made(SupervisedObjective())


def _warnings(metrics: list[dict[str, Any]]) -> list[str]:
    if len(metrics) > 1 and metrics[-1]["loss"] > metrics[0]["loss"]:
        first, last = metrics[0]["loss"], metrics[-1]["loss"]
        return [f"the loss rose from {first:.3f} to {last:.3f}: lower the learning rate"]
    return []
