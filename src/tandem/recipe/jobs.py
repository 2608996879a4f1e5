"""One stage to run, as one object: made from a recipe or from a command's flags.

In each job `run.model` is the model that the stage starts from and `run.output_dir` the folder
that it writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.pairs_settings import PairsSettings
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import MergeSettings, TrainingSettings


@dataclass(frozen=True)
class TrainingJob:
    """An adapter to train with SFT or DPO, as `settings` says."""

    run: RunSettings
    settings: TrainingSettings

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir)


@dataclass(frozen=True)
class MergeJob:
    """An adapter to merge into `run.model`."""

    run: RunSettings  # `chat_template` None keeps the one in the adapter's folder, or the base's
    settings: MergeSettings
    adapter: Path  # a peft adapter's folder
    force: bool = False  # whether to merge even if the adapter was trained on other weights

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir)


@dataclass(frozen=True)
class PairsJob:
    """Preference pairs to make; `run.model` writes answers unless the settings name a server."""

    run: RunSettings
    settings: PairsSettings
    in_round: int = 1  # decides what is sampled, and which part of the prompts is asked

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir)


@dataclass(frozen=True)
class EvaluationJob:
    """Models to measure side by side."""

    run: RunSettings  # `chat_template` and `added_tokens` are for models without their own template
    settings: EvaluationSettings
    # model or adapter folders by label; "base" is asked in completion form as well
    models: Mapping[str, str]
    # whether to replace a finished evaluation of other models or settings; its measurements are
    # used again
    replace: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.run.output_dir)
