"""From a stage's settings to its optimizer, its loop of steps, and what happens between steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tandem.data.batching.sampler import tenth
from tandem.model.companion_files import all_stop_ids
from tandem.model.trained_weights import hidden_matrices, trainable_parameters
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.console import StageProgress
from tandem.stages.training.context import BuiltObjective, TrainContext
from tandem.stages.training.held_out import METRICS, HeldOut
from tandem.stages.training.training_data import TrainingData
from tandem.train.callbacks.answer_prompts import AnswerPrompts
from tandem.train.callbacks.callback import (
    Callback,
    MetricsLog,
    SaveCheckpoints,
    ShowProgress,
    TrainingRun,
)
from tandem.train.callbacks.early_stopping import EarlyStopping
from tandem.train.callbacks.held_out_evaluation import HeldOutEvaluation, best_adapters
from tandem.train.engines.engine import without_live
from tandem.train.objectives.by_data_set import by_data_set
from tandem.train.optimizers import make_optimizer
from tandem.train.schedules import make_schedule
from tandem.train.step import StepRunner
from tandem.train.token_budget import TokenBudget, attention_weight
from tandem.train.trainer import Trainer


def saved_every(settings: TrainingSettings, total: int) -> int:
    """Steps from one checkpoint to the next."""
    return settings.save_steps or tenth(total)


def prepare_engine(
    context: TrainContext, model: Any, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Hand model and optimizer to the engine; `state` has a checkpoint's tensors of the optimizer.

    Returns the average of the trained weights that the model was loaded with, where `state` has
    those that move beside it.
    """
    engine, settings = context.engine, context.job.settings
    _, live = without_live(state)
    loaded = trainable_parameters(model) if live and context.weights.leaves == "adapter" else {}
    average = {name: parameter.detach().clone() for name, parameter in loaded.items()}
    optimizer = partial(
        make_optimizer,
        settings=settings,
        device=engine.device,
        matrices=hidden_matrices(model),
    )
    engine.prepare(model, optimizer, settings.max_grad_norm, context.stage.of_token)
    return average


def restore(
    context: TrainContext,
    checkpoint: Path | None,
    state: Mapping[str, Tensor],
    average: dict[str, Tensor],
) -> None:
    """Go on from a checkpoint, if there is one; `state` and `average` are as above."""
    engine, settings, (own, live) = context.engine, context.job.settings, without_live(state)
    saved = {} if checkpoint is None else context.weights.late(checkpoint)
    if weights := live or saved:
        engine.restore(weights)
    if own:
        engine.load_optimizer(own)
    if settings.ema_decay is not None:
        engine.keep_average(settings.ema_decay, average or (saved if live else {}))
    if engine.average is not None:
        context.log("the average of the weights is scored, and becomes the result")


def build_trainer(
    context: TrainContext,
    run: TrainingRun,
    records: TrainingData,
    objectives: Sequence[BuiltObjective],
    budget: TokenBudget,
    display: StageProgress,
) -> Trainer:
    """The loop of a stage, its callbacks before the run's; an objective for each data set."""
    settings, checkpoints, total = context.job.settings, context.checkpoints(), run.total_steps
    weight = attention_weight(context.base.config)

    def runner(built: BuiltObjective, part: TrainingData | HeldOut, **how: Any) -> StepRunner:
        examples = part.dataset if built.examples is None else built.examples
        return StepRunner(
            context.engine, by_data_set(built.objective, part.sizes), examples, budget, weight,
            observed=built.observed, **how,
        )  # fmt: skip

    own: list[Callback] = [MetricsLog(), ShowProgress(display)]
    saved = saved_every(settings, total)
    if settings.samples is not None:
        tokenizer, template, base = context.base.tokenizer, context.base.template, context.base
        own.append(
            AnswerPrompts(
                context.prompts,
                saved,
                settings.samples.max_new_tokens,
                all_stop_ids(base.folder, tokenizer, template),
                partial(tokenizer.decode, skip_special_tokens=True),
            )
        )
    own.append(SaveCheckpoints(checkpoints, saved))
    if records.held_out is not None:
        scored = runner(objectives[1], records.held_out, learns=False)
        assert settings.validation is not None
        every = settings.validation.steps or tenth(total)
        best = METRICS[settings.best_metric] if settings.keep == "best" else None
        kept = best_adapters(run.folder, context.weights)
        own.append(HeldOutEvaluation(scored, every, best, kept, checkpoints))
    if (early := settings.early_stopping) is not None:
        best = METRICS[early.metric]
        own.append(EarlyStopping(early.metric, best, early.patience, early.min_delta))
    run.callbacks = (*own, *run.callbacks)
    dropout = context.stage.dropout and settings.lora.dropout > 0
    seed = context.job.run.seed if dropout or context.noise is not None else None
    steps = runner(objectives[0], records, dropout_seed=seed)
    return Trainer(run, steps, make_schedule(settings, total))
