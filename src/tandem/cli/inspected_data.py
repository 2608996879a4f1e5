"""The flags of `tandem check` and `tandem show` that name data, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tandem.cli.parser import Parser, add_flag, path
from tandem.errors import UserError
from tandem.recipe.choices import TRAINING_STAGES
from tandem.recipe.flags.flag import DATA_FLAGS, REVISION, flag_of
from tandem.recipe.run_settings import RunSettings

if TYPE_CHECKING:
    from tandem.check.inputs import StageChat
    from tandem.check.survey_result import CheckTarget
    from tandem.recipe.recipe import Recipe


def add_inspected(parser: Parser) -> None:
    """Declare the flags that both commands share."""
    add = parser.add_argument
    add("data", metavar="DATA", nargs="*", type=path,
        help="Files, folders or Hub ids; by default the recipe's data.")  # fmt: skip
    add("--recipe", type=path, metavar="R",
        help="Whose data, limits, tokenizer and template: a name or a file.")  # fmt: skip
    add("--model", type=path, metavar="M",
        help="Whose tokenizer: a folder or a Hub id; no weights are fetched.")  # fmt: skip
    template = "A shipped one or a file; by default the recipe's, else the model's own."
    add_flag(parser, flag_of(RunSettings, "chat_template", help=template))
    add("--stage", choices=TRAINING_STAGES,
        help="As which stage reads it; by default the one that the data is for.")  # fmt: skip

    saying = parser.add_argument_group("about DATA, as the recipe's keys of these names say it")
    for flag in DATA_FLAGS:
        add_flag(saying, flag)
    add_flag(saying, REVISION)


def recipe_of(arguments: argparse.Namespace) -> Recipe | None:
    """Load the recipe that was named, if there is one."""
    if arguments.recipe is None:
        return None
    from tandem.recipe.load_recipe import load_recipe

    return load_recipe(arguments.recipe)


def chat_of(arguments: argparse.Namespace, recipe: Recipe | None) -> StageChat | None:
    """Load the tokenizer and template that were named, or the recipe's; None without either."""
    if arguments.model is None and recipe is None:
        if arguments.chat_template is not None:
            raise UserError(
                "--chat_template needs --model or --recipe, because a tokenizer renders it"
            )
        return None
    from tandem.check.inputs import stage_chat

    template = arguments.chat_template or (recipe.chat_template if recipe else None)
    added = recipe.added_tokens if recipe else ()
    if arguments.model is not None:
        return stage_chat(arguments.model, None, template, added)
    assert recipe is not None
    first = recipe.sft or recipe.dpo
    full = first is not None and first.full
    return stage_chat(recipe.model, recipe.model_revision, template, added, full=full)


def data_of(
    arguments: argparse.Namespace, recipe: Recipe | None, folder: Path
) -> tuple[Sequence[CheckTarget], Sequence[str]]:
    """Find what each stage would read of the named data, or of the recipe's own; and notices.

    `folder` is where the embedded demo's data is written. Raises UserError if there is no data.
    """
    from tandem.check.inputs import left_out

    targets, notices = _asked(arguments, recipe, folder)
    return targets, [*notices, *left_out(targets)]


def _asked(
    arguments: argparse.Namespace, recipe: Recipe | None, folder: Path
) -> tuple[Sequence[CheckTarget], Sequence[str]]:
    """See `data_of`."""
    from tandem.check.inputs import KINDS, by_kind, named_sources, recipe_data, stage_data, stage_of
    from tandem.recipe.flags.flag import data_settings

    settings = data_settings(vars(arguments))
    if not arguments.data:
        if settings:
            raise UserError(
                f"--{min(settings)} is about data that is named; name some, or leave it out"
            )
        assert recipe is not None
        if arguments.stage is None:
            return recipe_data(recipe, folder)
        return [stage_data(arguments.stage, recipe, None, folder)], []
    sources = named_sources(arguments.data, folder, recipe.seed if recipe else None, settings)
    if arguments.stage is not None:
        return [stage_data(arguments.stage, recipe, sources, folder)], []
    parts, unknown = by_kind(sources)
    notices = [
        f"{source.path} is of no known format, and read as {KINDS['sft']}; if it holds "
        f"{KINDS['dpo']}, give --stage dpo"
        for source in unknown
    ]
    targets = [stage_data(stage_of(kind), recipe, some, folder) for kind, some in parts.items()]
    return targets, notices
