"""From a recipe to the job of each of its stages."""

from __future__ import annotations

from typing import Any

from tandem.recipe.data_source import DataSource
from tandem.recipe.jobs import EvaluationJob, MergeJob, PairsJob, TrainingJob
from tandem.recipe.recipe import Recipe, result_of
from tandem.recipe.run_settings import RunSettings
from tandem.storage.run_folder import StageName, made_pairs, stage_folder


def sft_job(recipe: Recipe) -> TrainingJob:
    """Fine-tune the base model."""
    assert recipe.sft is not None
    return TrainingJob(_run(recipe, "sft"), recipe.sft)


def dpo_job(recipe: Recipe) -> TrainingJob:
    """Align the merged model, or the base, with the recipe's pairs or those that were made."""
    settings = recipe.dpo
    assert settings is not None
    if not settings.data:
        made = made_pairs(stage_folder(recipe.output_dir, "pairs"))
        assert made is not None, "the pairs stage comes before"
        settings = settings.model_copy(update={"data": (DataSource(path=str(made)),)})
    # A merged model brings the template it was tuned with.
    merged: dict[str, Any] = {"model_revision": None, "chat_template": None, "added_tokens": ()}
    changes = merged if recipe.sft else {}
    return TrainingJob(_run(recipe, "dpo", model=_aligned(recipe), **changes), settings)


def merge_job(recipe: Recipe, stage: StageName) -> MergeJob:
    """Merge the first adapter into the base, or the second one into what DPO began with."""
    trained: StageName = "sft" if stage == "sft-merge" else "dpo"
    base = _base(recipe) if trained == "sft" else _aligned(recipe)
    run = _run(recipe, stage, model=base, model_revision=None, chat_template=None)
    return MergeJob(run, recipe.merge, stage_folder(recipe.output_dir, trained))


def pairs_job(recipe: Recipe) -> PairsJob:
    """Make preference pairs, by default with the merged model."""
    assert recipe.pairs is not None
    model = recipe.pairs.model or _aligned(recipe)
    return PairsJob(_run(recipe, "pairs", model=model), recipe.pairs)


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
        models["dpo"] = str(stage_folder(recipe.output_dir, result_of(recipe, "dpo")))
    return EvaluationJob(_run(recipe, "evaluate"), settings, models)


def _run(recipe: Recipe, stage: StageName, **changes: Any) -> RunSettings:
    """The recipe's settings of the run for one stage, which writes into its own folder."""
    folder = str(stage_folder(recipe.output_dir, stage))
    return recipe.model_copy(update={"output_dir": folder, **changes})


def _base(recipe: Recipe) -> str:
    """The model that the run begins with; a revision on the Hub as its local folder."""
    from tandem.model.model_folder import model_folder

    if recipe.model_revision is None:
        return recipe.model
    return str(model_folder(recipe.model, recipe.model_revision))


def _aligned(recipe: Recipe) -> str:
    """What DPO begins with: the model that SFT led to, or the base where there is no SFT."""
    if recipe.sft is None:
        return recipe.model
    return str(stage_folder(recipe.output_dir, result_of(recipe, "sft")))
