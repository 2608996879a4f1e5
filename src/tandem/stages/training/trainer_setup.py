"""From a stage's settings to its optimizer, its loop of steps and its held-out scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from tandem.data.batching.sampler import tenth
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.console import StageProgress
from tandem.stages.training.context import TrainContext
from tandem.stages.training.held_out import best_by, scored_every
from tandem.stages.training.training_data import TrainingData
from tandem.train.checkpoint import RunState
from tandem.train.held_out_evaluation import HeldOutEvaluation
from tandem.train.losses.objectives import Objective
from tandem.train.optimizers import make_optimizer, make_schedule
from tandem.train.token_budget import TokenBudget, attention_weight
from tandem.train.trainer import Schedule, Training


def saved_every(settings: TrainingSettings, total: int) -> int:
    """Steps from one checkpoint to the next."""
    return settings.save_steps or tenth(total)


def prepare_engine(context: TrainContext, model: Any, state: Mapping[str, Tensor]) -> None:
    """Hand a stage's model to its engine, with the optimizer that the settings ask for.

    Args:
        context: resolved.
        model: with its adapter.
        state: the optimizer's tensors where a run goes on; empty in a new one.
    """
    engine, settings = context.engine, context.job.settings
    engine.prepare(
        model,
        partial(make_optimizer, settings=settings, device=engine.device),
        settings.max_grad_norm,
    )
    if state:
        engine.load_optimizer(state)


def take_steps(
    context: TrainContext,
    model: Any,
    records: TrainingData,
    objectives: Sequence[Objective],
    *,
    budget: TokenBudget,
    progress: RunState,
    total: int,
    display: StageProgress,
) -> RunState:
    """Take all steps that remain of a stage.

    Args:
        context: resolved, its engine prepared.
        model: that the engine holds.
        records: to train on, and held out.
        objectives: of the first, and of the second if there are any.
        budget: tokens of a micro-batch.
        progress: where the run stands.
        total: steps of the whole run.
        display: told each step and score.
    """
    settings, checkpoints = context.job.settings, context.checkpoints()
    schedule = Schedule(
        total_steps=total,
        batch_size=settings.batch_size,
        seed=context.job.run.seed,
        attention_weight=attention_weight(context.base.config),
        logging_steps=settings.logging_steps,
        save_steps=saved_every(settings, total),
        parts=records.parts,
    )
    held_out = None
    if records.held_out is not None:
        held_out = HeldOutEvaluation(
            engine=context.engine,
            model=model,
            trees=records.held_out.dataset,
            objective=objectives[1],
            budget=budget,
            attention_weight=schedule.attention_weight,
            every=scored_every(settings, total),
            folder=context.job.folder,
            best=best_by(settings),
            checkpoints=checkpoints,
            show=display.scored,
        )
    return Training(
        engine=context.engine,
        model=model,
        trees=records.dataset,
        objective=objectives[0],
        learning_rate=make_schedule(settings, total),
        schedule=schedule,
        budget=budget,
        dropout=context.stage.dropout and settings.lora.dropout > 0,
        folder=context.job.folder,
        checkpoints=checkpoints,
        progress=progress,
        advance=display.advance,
        held_out=held_out,
    ).run()
