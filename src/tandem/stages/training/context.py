"""How training stages differ, and what they hand to their objectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.records import Example
from tandem.data.tokenize.added_tokens import AddedTokens
from tandem.data.tokenize.chat_template import ChatTemplate
from tandem.model.added_tokens import described_rows
from tandem.model.base_model import lasting_name
from tandem.model.lora.adapter import LoraWeights
from tandem.model.trained_weights import TrainedWeights
from tandem.recipe.run_settings import Runtime
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.console import log
from tandem.train.checkpoint import CheckpointStore
from tandem.train.engines.engine import Engine
from tandem.train.losses.objectives import Objective
from tandem.train.token_budget import TokenBudget


@dataclass(frozen=True)
class Start:
    """What an objective may need when it is made: the engine holds the untrained policy.

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
class Made:
    """An objective and what making it cost."""

    objective: Objective
    reference_seconds: float = 0.0
    reference_computed: int = 0


def lora_weights(stage: Stage) -> TrainedWeights:
    """The adapter that a stage's settings ask for."""
    base, revision = lasting_name(stage.base_name, stage.base)
    return LoraWeights(stage.settings.lora, stage.seed, base, revision, dropout=stage.kind.dropout)


@dataclass(frozen=True)
class StageKind:
    """How one training stage differs from the other.

    `prepare` reads and encodes its data, `make_objective` says what a step minimises, `dropout`
    whether the adapter's dropout may be on, `warnings` looks over the finished metrics, `weights`
    says what is trained.
    """

    name: str
    prepare: Callable[..., EncodedDataset]
    make_objective: Callable[[Start], Made]
    dropout: bool
    warnings: Callable[[list[dict[str, Any]]], list[str]]
    weights: Callable[[Stage], TrainedWeights] = lora_weights


@dataclass(frozen=True)
class Stage:
    """The resolved pieces of one training stage.

    Attributes:
        kind: how it differs from the other.
        settings: its section of the recipe.
        folder: where it writes.
        seed: of order, adapter and dropout.
        runtime: device, dtype, attention.
        engine: holds no model yet.
        console: for progress.
        base: the model's folder.
        config: its transformers configuration.
        base_name: what the run calls the model.
        tokenizer, template: of the model.
        added: tokens whose embeddings are trained.
        warnings: what was found of the model and the settings before the first step.
    """

    kind: StageKind
    settings: TrainingSettings
    folder: Path
    seed: int
    runtime: Runtime
    engine: Engine
    console: Console
    base: Path
    config: Any
    base_name: str
    tokenizer: Any
    template: ChatTemplate
    added: AddedTokens
    warnings: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the embeddings, those of added tokens among them."""
        return described_rows(self.config, self.added)

    def log(self, text: str) -> None:
        """Put a line on the console, the stage's name before it."""
        log(self.console, f"{self.kind.name}: {text}")

    @property
    def weights(self) -> TrainedWeights:
        """What is trained."""
        return self.kind.weights(self)

    def checkpoints(self) -> CheckpointStore:
        """Where its checkpoints go."""
        return CheckpointStore(
            self.folder / "checkpoints",
            self.weights,
            keep=self.settings.save_total_limit,
            lines=(self.folder / "metrics.jsonl", self.folder / "validation.jsonl"),
        )
