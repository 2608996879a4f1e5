"""From a stage's settings to its loop of steps, and to the scores of held-out records beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.data.order import tenth
from tandem.recipe.training import Training as TrainingSettings
from tandem.stages.records import Records
from tandem.stages.validation import best_by, scored_every
from tandem.train.checkpoint import CheckpointStore, Progress
from tandem.train.engine import Engine
from tandem.train.held_out import HeldOutScores
from tandem.train.loop import Schedule, Training
from tandem.train.memory import TokenBudget
from tandem.train.objective import Objective
from tandem.train.optim import make_schedule, warmup
from tandem.train.progress import StageProgress


def saved_every(settings: TrainingSettings, total: int) -> int:
    """Steps from one checkpoint to the next."""
    return settings.save_steps or tenth(total)


def take_steps(
    engine: Engine,
    model: Any,
    records: Records,
    objectives: Sequence[Objective],
    settings: TrainingSettings,
    *,
    dropout: bool,
    attention_weight: float,
    budget: TokenBudget,
    seed: int,
    folder: Path,
    checkpoints: CheckpointStore,
    progress: Progress,
    total: int,
    display: StageProgress,
) -> Progress:
    """Take all steps that remain of a stage.

    Args:
        engine, model: prepared.
        records: to train on, and held out.
        objectives: of the first, and of the second if there are any.
        settings: of the stage.
        dropout: whether the stage's kind has any.
        attention_weight: see `data.packing.tree_cost`.
        budget: tokens of a micro-batch.
        seed: of order and dropout.
        folder: the stage's.
        checkpoints: where they go.
        progress: where the run stands.
        total: steps of the whole run.
        display: told each step and score.
    """
    schedule = Schedule(
        total_steps=total,
        batch_size=settings.batch_size,
        seed=seed,
        attention_weight=attention_weight,
        logging_steps=settings.logging_steps,
        save_steps=saved_every(settings, total),
        parts=records.parts,
    )
    held_out = None
    if records.held_out is not None:
        held_out = HeldOutScores(
            engine=engine,
            model=model,
            trees=records.held_out.trees,
            objective=objectives[1],
            budget=budget,
            attention_weight=attention_weight,
            every=scored_every(settings, total),
            folder=folder,
            best=best_by(settings),
            checkpoints=checkpoints,
            show=display.scored,
        )
    return Training(
        engine=engine,
        model=model,
        trees=records.trees,
        objective=objectives[0],
        learning_rate=make_schedule(
            settings.lr_scheduler,
            learning_rate=settings.learning_rate,
            warmup_steps=warmup(total, steps=settings.warmup_steps, ratio=settings.warmup_ratio),
            total_steps=total,
        ),
        schedule=schedule,
        budget=budget,
        dropout=dropout and settings.lora.dropout > 0,
        folder=folder,
        checkpoints=checkpoints,
        progress=progress,
        advance=display.advance,
        held_out=held_out,
    ).run()
