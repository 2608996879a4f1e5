"""From a recipe to the job of each of its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tandem.recipe.data_source import DataSource
from tandem.recipe.jobs import EvaluationJob, MergeJob, PairsJob, TrainingJob
from tandem.recipe.recipe import Recipe, result_of
from tandem.recipe.run_settings import RunSettings
from tandem.storage.run_folder import Stage, StageName, made_pairs, stage_folder


def sft_job(recipe: Recipe) -> TrainingJob:
    """Fine-tune the base model."""
    assert recipe.sft is not None
    return TrainingJob(_run(recipe, Stage("sft")), recipe.sft)


def dpo_job(recipe: Recipe, in_round: int = 1) -> TrainingJob:
    """Align the model so far with the recipe's pairs, or with those that the round has made."""
    settings = recipe.dpo
    assert settings is not None
    if not settings.data:
        made = made_pairs(stage_folder(recipe.output_dir, "pairs", in_round))
        assert made is not None, "the pairs stage comes before"
        settings = settings.model_copy(update={"data": (DataSource(path=str(made)),)})
    # A merged model brings the template it was tuned with.
    merged: dict[str, Any] = {"model_revision": None, "chat_template": None, "added_tokens": ()}
    changes = merged if recipe.sft or in_round > 1 else {}
    model = _aligned(recipe, in_round)
    return TrainingJob(_run(recipe, Stage("dpo", in_round), model=model, **changes), settings)


def merge_job(recipe: Recipe, stage: StageName, in_round: int = 1) -> MergeJob:
    """Merge SFT's adapter into the base, or a round's into what its DPO began with."""
    trained: StageName = "sft" if stage == "sft-merge" else "dpo"
    base = _base(recipe) if trained == "sft" else _aligned(recipe, in_round)
    run = _run(recipe, Stage(stage, in_round), model=base, model_revision=None, chat_template=None)
    return MergeJob(run, recipe.merge, stage_folder(recipe.output_dir, trained, in_round))


def pairs_job(recipe: Recipe, in_round: int = 1) -> PairsJob:
    """Make a round's preference pairs, by default with the model so far.

    Pairs are held out in the first round alone, so that all models are measured on the same.
    """
    settings = recipe.pairs
    assert settings is not None
    model = settings.model or _aligned(recipe, in_round)
    if in_round > 1:
        settings = settings.model_copy(update={"heldout": ()})
    return PairsJob(_run(recipe, Stage("pairs", in_round), model=model), settings, in_round)


def evaluation_job(recipe: Recipe) -> EvaluationJob:
    """Ask all models of the run the same, by default with the pairs that were held out."""
    settings = recipe.evaluate
    assert settings is not None
    held_out = made_pairs(stage_folder(recipe.output_dir, "pairs"), "heldout")
    if not settings.pairs and held_out is not None:
        settings = settings.model_copy(update={"pairs": (DataSource(path=str(held_out)),)})
    models = {"base": _base(recipe)}
    if recipe.sft is not None:
        models["sft"] = str(stage_folder(recipe.output_dir, result_of(recipe, "sft")))
    if recipe.dpo is not None:
        result = result_of(recipe, "dpo")
        for number in range(1, recipe.rounds + 1):
            folder = stage_folder(recipe.output_dir, result, number)
            models[Stage("dpo", number).name] = str(folder)
    return EvaluationJob(_run(recipe, Stage("evaluate")), settings, models)


def _run(recipe: Recipe, stage: Stage, **changes: Any) -> RunSettings:
    """The recipe's settings of the run for one stage, which writes into its own folder."""
    folder = str(Path(recipe.output_dir) / stage.folder)
    return recipe.model_copy(update={"output_dir": folder, **changes})


def _base(recipe: Recipe) -> str:
    """The model that the run begins with; a revision on the Hub as its local folder."""
    from tandem.model.model_folder import model_folder

    if recipe.model_revision is None:
        return recipe.model
    return str(model_folder(recipe.model, recipe.model_revision))


def _aligned(recipe: Recipe, in_round: int) -> str:
    """The model that a round begins with: that of the round before, of SFT, or the base."""
    if in_round > 1:
        return str(stage_folder(recipe.output_dir, result_of(recipe, "dpo"), in_round - 1))
    if recipe.sft is None:
        return recipe.model
    return str(stage_folder(recipe.output_dir, result_of(recipe, "sft")))
