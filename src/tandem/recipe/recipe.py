"""What a recipe may say, and the stages that it asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from tandem.errors import UserError
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.pairs_settings import PairsSettings
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import MergeSettings, SftSettings
from tandem.storage.run_folder import MOST_ROUNDS, Stage, StageName, TrainingStageName


class Recipe(RunSettings):
    """A whole run: base model -> SFT -> merge -> (pairs) -> DPO -> merge -> evaluation."""

    name: str = Field(description="The run's name.")
    sft: SftSettings | None = Field(
        default=None, description="Supervised fine-tuning; null leaves the stage out."
    )
    merge: MergeSettings = Field(default=MergeSettings(), description="How adapters are merged.")
    pairs: PairsSettings | None = Field(
        default=None, description="Making preference pairs; null: `dpo.data` has them."
    )
    dpo: DpoSettings | None = Field(
        default=None, description="Direct Preference Optimization; null leaves the stage out."
    )
    rounds: Annotated[int, Field(ge=1, le=MOST_ROUNDS)] = Field(
        default=1,
        description="How often pairs are made and trained on, each time by the model of the round "
        "before; see rounds.md.",
    )
    evaluate: EvaluationSettings | None = Field(
        default=None, description="Questions at the end; null leaves the stage out."
    )

    @model_validator(mode="after")
    def _connected(self) -> Recipe:
        if self.sft is None and self.dpo is None and self.pairs is None:
            raise ValueError(
                "a recipe needs an sft section, a dpo section or both, or a pairs section"
            )
        for name, section in (("sft", self.sft), ("dpo", self.dpo)):
            if section is not None and section.full and self.quantization is not None:
                raise ValueError(
                    f"{name}.full trains all weights, which quantization: {self.quantization} "
                    "would pack; remove one of them"
                )
        if self.dpo is not None and not self.dpo.data and self.pairs is None:
            raise ValueError("dpo.data is missing: name a data set, or add a pairs section")
        if (wrong := next(self._against_rounds(), None)) is not None:
            raise ValueError(wrong)
        return self

    def _against_rounds(self) -> Iterator[str]:
        """Say what of the recipe keeps it from being done in so many rounds."""
        rounds, pairs, dpo = f"rounds: {self.rounds}", self.pairs, self.dpo
        if pairs is not None and 1 < pairs.parts < self.rounds:
            yield (
                f"pairs.parts: {pairs.parts} divides the prompts among {pairs.parts} rounds, and "
                f"there are {rounds}; set pairs.parts to {self.rounds} or more, or to 1, which "
                "asks all prompts in every round"
            )
        if self.rounds == 1:
            return
        for name, section in (("pairs", pairs), ("dpo", dpo)):
            if section is None:
                yield (
                    f"{rounds} repeats the pairs and dpo stages, and the recipe has no {name} "
                    f"section; add one, or set rounds: 1"
                )
        assert pairs is not None
        assert dpo is not None
        if dpo.data:
            yield (
                f"{rounds} trains on the pairs that each round makes, and dpo.data names "
                f"{dpo.data[0].path}; remove dpo.data, or set rounds: 1"
            )
        for name in ("server", "model"):
            if getattr(pairs, name) is not None:
                yield (
                    f"{rounds} asks the model that each round has trained, and with pairs.{name} "
                    f"another one writes the answers of all rounds; remove pairs.{name}, or set "
                    "rounds: 1"
                )
        if pairs.parts == 1 and dpo.validation is not None and dpo.validation.fraction is not None:
            yield (
                f"{rounds} asks the same prompts in every round, and dpo.validation.fraction would "
                "hold out others in each, which another round has trained on; divide the prompts "
                f"(pairs.parts: {self.rounds}), or name held-out pairs (dpo.validation.data)"
            )
        if dpo.lora.start is not None:
            yield (
                f"{rounds} gives each round an adapter of its own, and dpo.lora.from goes on with "
                "one that was trained on another model than that of later rounds; remove it, or "
                "set rounds: 1"
            )


@dataclass(frozen=True)
class PipelineStage:
    """A stage of a recipe, its folder, and a line on what it does."""

    stage: Stage
    folder: Path
    note: str

    @property
    def name(self) -> str:
        """What commands call it."""
        return self.stage.name


def result_of(recipe: Recipe, stage: TrainingStageName) -> StageName:
    """The stage whose folder has the model that a training stage of a recipe leads to."""
    settings = recipe.sft if stage == "sft" else recipe.dpo
    if settings is not None and settings.full:
        return stage
    return "sft-merge" if stage == "sft" else "dpo-merge"


def stages_of(recipe: Recipe) -> list[PipelineStage]:
    """Return the stages of a recipe in order; this needs neither data nor weights."""
    notes: dict[Stage, str] = {}
    if recipe.sft is not None:
        data = ", ".join(source.path for source in recipe.sft.data)
        what = f"all weights of {recipe.model}" if recipe.sft.full else recipe.model
        notes[Stage("sft")] = f"fine-tune {what} on {data}"
        if not recipe.sft.full:
            notes[Stage("sft-merge")] = "merge the adapter, verified"
    for number in range(1, recipe.rounds + 1):
        notes |= _round_notes(recipe, number)
    if recipe.evaluate is not None:
        aligned = "final model" if recipe.rounds == 1 else "the model of each round"
        note = f"base, SFT and {aligned} on held-out questions and pairs"
        named = [n for n in (recipe.evaluate.suite, *recipe.evaluate.tasks) if n]
        notes[Stage("evaluate")] = f"{note}, and on {', '.join(named)}" if named else note
    root = Path(recipe.output_dir)
    return [PipelineStage(stage, root / stage.folder, note) for stage, note in notes.items()]


def _round_notes(recipe: Recipe, number: int) -> dict[Stage, str]:
    """Say what the stages of one round do."""
    notes: dict[Stage, str] = {}
    if recipe.pairs is not None:
        prompts = ", ".join(source.path for source in recipe.pairs.prompts)
        server = recipe.pairs.server
        writer = server.model if server else recipe.pairs.model or "the model so far"
        if recipe.pairs.parts > 1:
            prompts = f"part {number} of {recipe.pairs.parts} of {prompts}"
        answers = "both answers" if recipe.pairs.rank is not None else "rejected answers"
        notes[Stage("pairs", number)] = f"prompts of {prompts}, {answers} by {writer}"
    if recipe.dpo is not None:
        data = ", ".join(source.path for source in recipe.dpo.data) or "the pairs made before"
        model = "the final model" if number == recipe.rounds else f"the model of round {number}"
        if recipe.dpo.full:
            notes[Stage("dpo", number)] = f"align all weights with {data}: {model}"
        else:
            notes[Stage("dpo", number)] = f"align with {data}"
            notes[Stage("dpo-merge", number)] = f"merge the adapter, verified: {model}"
    return notes


def asked_for(stages: Sequence[PipelineStage], *, until: str | None, start: str | None) -> range:
    """Return the positions of the stages from `start` to `until`.

    Raises UserError for a stage that the recipe lacks, and for an end before the start.
    """
    names: list[str] = [stage.name for stage in stages]
    for flag, name in (("--until", until), ("--from", start)):
        if name is not None and name not in names:
            raise UserError(f"{flag} {name}: this recipe's stages are {', '.join(names)}")
    first = names.index(start) if start else 0
    last = names.index(until) if until else len(names) - 1
    if first > last:
        raise UserError(f"--from {start} comes after --until {until}")
    return range(first, last + 1)
