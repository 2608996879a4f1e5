"""Before the first stage: what a later one would stumble over after hours of work."""

from __future__ import annotations

from collections.abc import Set

from tandem.recipe.schema import DataSource, Recipe, Training


def check_inputs(recipe: Recipe, wanted: Set[str]) -> None:
    """Look for the data and models that a run will need.

    What is on the Hub, and the embedded demo's, is looked for when its stage comes.

    Args:
        recipe: the resolved recipe.
        wanted: names of the stages that are to run.

    Raises UserError for local data that is not there, a folder that is no model, and lengths
    beyond the base model's context.
    """
    from tandem.data.sources import local_files, looks_like_path

    for source in _data(recipe, wanted):
        path = source.path
        if not path.startswith("demo:") and looks_like_path(path):
            local_files(path, source.split)
    _check_model(recipe.model, [s.max_length for s in _trained(recipe, wanted)])
    if recipe.pairs is not None and recipe.pairs.model is not None and "pairs" in wanted:
        _check_model(recipe.pairs.model, [])


def _data(recipe: Recipe, wanted: Set[str]) -> list[DataSource]:
    found = [source for section in _trained(recipe, wanted) for source in section.data]
    if recipe.pairs is not None and "pairs" in wanted:
        found += [*recipe.pairs.prompts, *recipe.pairs.heldout]
    if recipe.evaluate is not None and "evaluate" in wanted:
        found += [*recipe.evaluate.questions, *recipe.evaluate.pairs]
    return found


def _trained(recipe: Recipe, wanted: Set[str]) -> list[Training]:
    sections = {"sft": recipe.sft, "dpo": recipe.dpo}
    return [s for name, s in sections.items() if s is not None and name in wanted]


def _check_model(name: str, lengths: list[int]) -> None:
    from tandem.data.sources import looks_like_path

    if name.startswith("demo:") or not looks_like_path(name):
        return
    from tandem.model.load import check_context, load_config, model_folder

    folder = model_folder(name)
    config = load_config(folder)
    for length in lengths:
        check_context(config, length, folder)
