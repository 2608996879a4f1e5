"""How training stages differ, and what they hand to their objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from torch import Tensor

from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.encoded.example import Example
from tandem.data.formats.format import Kind
from tandem.model.base_model import BaseModelInfo, lasting_name
from tandem.model.full.full_weights import FullWeights
from tandem.model.lora.adapter import LoraWeights
from tandem.model.trained_weights import TrainedWeights
from tandem.recipe.data_source import DataSource
from tandem.recipe.jobs import TrainingJob
from tandem.recipe.training_settings import SftSettings
from tandem.runtime.console import log
from tandem.train.callbacks.answer_prompts import SAMPLES, AskedPrompt
from tandem.train.checkpoint import CheckpointStore
from tandem.train.engines.engine import Engine
from tandem.train.objectives.objective import Objective
from tandem.train.token_budget import TokenBudget


@dataclass(frozen=True)
class ObjectiveInputs:
    """What an objective may need to be built; the engine holds the untrained policy."""

    engine: Engine
    model: Any
    dataset: EncodedDataset
    model_hash: str
    backend: str
    numerics: str
    budget: TokenBudget
    console: Console
    weights: TrainedWeights
    what: str = ""  # a word before the records' name on the console, such as held-out


@dataclass(frozen=True)
class BuiltObjective:
    """An objective and what making it cost."""

    objective: Objective
    # what it is a function of, where that is not the encoded records as they are
    examples: Sequence[Example] | None = None
    observed: Sequence[Example] | None = None  # see `StepRunner`
    reference_seconds: float = 0.0
    reference_computed: int = 0


def weights_of(context: TrainContext) -> TrainedWeights:
    """What a job trains: an adapter, or all weights."""
    job, dropout = context.job, context.stage.dropout
    if job.settings.full:
        return FullWeights(context.base.folder, job.settings.save_dtype)
    base, revision = lasting_name(context.base.name, context.base.folder)
    return LoraWeights(
        job.settings.lora, job.run.seed, base, revision,
        dropout=dropout, keeps_start=context.stage.reference,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingStage:
    """How one training stage differs from the other."""

    name: str
    records: Kind  # what it trains on
    make_objective: Callable[[ObjectiveInputs], BuiltObjective]  # what a step minimises
    dropout: bool  # whether the adapter's dropout may be on
    warnings: Callable[[list[dict[str, Any]]], list[str]]  # what the finished metrics show
    reference: bool = False  # whether the model as it was before training is asked for
    weights: Callable[[TrainContext], TrainedWeights] = weights_of  # what is trained
    # what a token's log-prob is replaced by while the model trains
    of_token: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class TrainContext:
    """A running training stage: its job, and what was made of it."""

    stage: TrainingStage
    job: TrainingJob
    engine: Engine  # holds no model yet
    console: Console
    base: BaseModelInfo  # the model that it starts from
    sources: list[DataSource]  # the data to train on
    held_out: list[DataSource]  # data sets that are scored and not trained on
    warnings: tuple[str, ...] = ()  # on the model and the settings
    prompts: Sequence[AskedPrompt] = ()  # that the model answers on the way

    def log(self, text: str, style: str = "") -> None:
        """Put a line on the console, the stage's name before it."""
        log(self.console, f"{self.stage.name}: {text}", style=style)

    def warned(self, *warnings: str, logged: bool = False) -> TrainContext:
        """Add warnings, and put them on the console unless they were `logged` before."""
        for warning in () if logged else warnings:
            self.log(warning, style="yellow")
        return replace(self, warnings=(*self.warnings, *warnings))

    @property
    def weights(self) -> TrainedWeights:
        """What is trained."""
        return self.stage.weights(self)

    @property
    def noise(self) -> float | None:
        """Alpha of the noise on the input embeddings, if there is any."""
        settings = self.job.settings
        return settings.neftune_alpha if isinstance(settings, SftSettings) else None

    def checkpoints(self) -> CheckpointStore:
        """Where its checkpoints go."""
        folder = self.job.folder
        names = ["metrics.jsonl", "validation.jsonl", *([SAMPLES] if self.prompts else [])]
        return CheckpointStore(
            folder / "checkpoints",
            self.weights,
            keep=self.job.settings.save_total_limit,
            lines=[folder / name for name in names],
        )
