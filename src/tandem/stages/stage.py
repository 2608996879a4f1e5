"""One training stage with all that is known before its data is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.added_tokens import AddedTokens
from tandem.data.template import ChatTemplate
from tandem.model.vocabulary import described_rows
from tandem.recipe.training import Training
from tandem.stages.kind import StageKind
from tandem.train.checkpoint import CheckpointStore
from tandem.train.engine import Engine
from tandem.train.progress import say
from tandem.train.runtime import Runtime


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
    settings: Training
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

    def tell(self, text: str) -> None:
        """Put a line on the console, the stage's name before it."""
        say(self.console, f"{self.kind.name}: {text}")

    def checkpoints(self) -> CheckpointStore:
        """Where its checkpoints go."""
        return CheckpointStore(
            self.folder / "checkpoints",
            keep=self.settings.save_total_limit,
            lines=(self.folder / "metrics.jsonl", self.folder / "validation.jsonl"),
        )
