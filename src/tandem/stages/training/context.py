"""How training stages differ, and what they hand to their objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console

from tandem.data.encoded.example import Example
from tandem.data.formats.format import Kind
from tandem.model.base_model import BaseModelInfo, lasting_name
from tandem.model.lora.adapter import LoraWeights
from tandem.model.trained_weights import TrainedWeights
from tandem.recipe.data_source import DataSource
from tandem.recipe.jobs import TrainingJob
from tandem.runtime.console import log
from tandem.train.checkpoint import CheckpointStore
from tandem.train.engines.engine import Engine
from tandem.train.losses.objectives import Objective
from tandem.train.token_budget import TokenBudget


@dataclass(frozen=True)
class ObjectiveInputs:
    """What an objective may need to be built; the engine holds the untrained policy.

    `what` is a word before the records' name on the console, such as held-out.
    """

    engine: Engine
    model: Any
    dataset: Sequence[Example]
    model_hash: str
    backend: str
    numerics: str
    budget: TokenBudget
    console: Console
    weights: TrainedWeights
    what: str = ""


@dataclass(frozen=True)
class BuiltObjective:
    """An objective and what making it cost."""

    objective: Objective
    reference_seconds: float = 0.0
    reference_computed: int = 0


def lora_weights(context: TrainContext) -> TrainedWeights:
    """Make the adapter that a job asks for."""
    job, dropout = context.job, context.stage.dropout
    base, revision = lasting_name(context.base.name, context.base.folder)
    return LoraWeights(job.settings.lora, job.run.seed, base, revision, dropout=dropout)


@dataclass(frozen=True)
class TrainingStage:
    """How one training stage differs from the other.

    `records` are what it trains on, `make_objective` says what a step minimises, `dropout`
    whether the adapter's dropout may be on, `warnings` looks over the finished metrics, `weights`
    says what is trained.
    """

    name: str
    records: Kind
    make_objective: Callable[[ObjectiveInputs], BuiltObjective]
    dropout: bool
    warnings: Callable[[list[dict[str, Any]]], list[str]]
    weights: Callable[[TrainContext], TrainedWeights] = lora_weights


@dataclass(frozen=True)
class TrainContext:
    """A training stage at work: its job, and what was made of it.

    Attributes:
        stage: how it differs from the other.
        job: what is asked for.
        engine: holds no model yet.
        console: for progress.
        base: the model that it starts from.
        sources: the data to train on.
        held_out: data sets that are scored and not trained on.
        warnings: what was found of the model and the settings before the first step.
    """

    stage: TrainingStage
    job: TrainingJob
    engine: Engine
    console: Console
    base: BaseModelInfo
    sources: list[DataSource]
    held_out: list[DataSource]
    warnings: tuple[str, ...] = ()

    def log(self, text: str, style: str = "") -> None:
        """Put a line on the console, the stage's name before it."""
        log(self.console, f"{self.stage.name}: {text}", style=style)

    def warned(self, *warnings: str, said: bool = False) -> TrainContext:
        """Add warnings; they are put on the console unless they were `said` before."""
        for warning in () if said else warnings:
            self.log(warning, style="yellow")
        return replace(self, warnings=(*self.warnings, *warnings))

    @property
    def weights(self) -> TrainedWeights:
        """What is trained."""
        return self.stage.weights(self)

    def checkpoints(self) -> CheckpointStore:
        """Where its checkpoints go."""
        folder = self.job.folder
        return CheckpointStore(
            folder / "checkpoints",
            self.weights,
            keep=self.job.settings.save_total_limit,
            lines=(folder / "metrics.jsonl", folder / "validation.jsonl"),
        )
