"""`tandem.check`: what is in a data set, before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tandem.api.data import named_data
from tandem.api.pages import preformatted, printed
from tandem.api.recipes import AnyRecipe, loaded_recipe
from tandem.api.result import Model, path_of
from tandem.api.session import open_console, require_alone
from tandem.api.training import validated
from tandem.errors import UserError
from tandem.recipe.choices import TrainingStageName
from tandem.recipe.data_source import DataSource
from tandem.recipe.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from tandem.api.data import Data
    from tandem.check.findings import Finding
    from tandem.check.inputs import StageChat
    from tandem.check.survey_result import CheckTarget, Survey


def check(
    data: Data | None = None,
    *,
    model: Model | None = None,
    recipe: AnyRecipe | None = None,
    stage: TrainingStageName | None = None,
    chat_template: str | None = None,
    against: Data | None = None,
    limit: int | None = None,
    rows: int = 3,
    quiet: bool = False,
) -> Findings:
    """Read data once and say what is in it, as `tandem check` does; nothing is trained.

    Data that would not train raises nothing: `trains` is false, and `problem` says why.

    Args:
        data: as for `sft` and `dpo`; None: the recipe's own.
        model: whose tokenizer and template; no weights are fetched. Without one, lengths are in
            characters.
        recipe: whose limits, tokenizer and template; a name, a file or a recipe.
        stage: as which stage reads it; None: the one that the data is for.
        chat_template: a shipped one or a file; None: the recipe's, else the model's own.
        against: evaluation or validation sets, with which nothing should be shared.
        limit: only the first so many rows.
        rows: rows shown of each finding.
        quiet: print no progress.

    Raises UserError for data, models and recipes that are not there.
    """
    from tandem.check.check_data import CheckJob, check_as_json, surveys_of

    require_alone("check")
    loaded = None if recipe is None else loaded_recipe(recipe)
    if data is None and loaded is None:
        raise UserError("check() needs data, or recipe= whose data is looked at")
    chat = _chat(model, loaded, chat_template)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        targets, notices = _targets(data, loaded, stage, folder)
        others = [] if against is None else [source.path for source in _sources(against, folder)]
        job = CheckJob(targets, chat, loaded, others, limit, rows, notices)
        surveys, notices = surveys_of(job, folder, open_console(quiet=quiet))
        # Pages name the rows' places, for which the files must be there.
        figures, text = check_as_json(job, surveys, notices), _pages(chat, surveys, notices)
    return Findings(tuple(surveys), figures, text)


@dataclass(frozen=True)
class Findings:
    """What is in some data."""

    surveys: tuple[Survey, ...]  # of each stage's data, its validation data after it
    figures: dict[str, Any]  # all of it as plain values, as `tandem check --json` prints it
    text: str  # the pages that `tandem check` prints

    @property
    def trains(self) -> bool:
        """Whether a run would train on it."""
        return all(one.problem is None for one in self.surveys)

    @property
    def problem(self) -> str | None:
        """The error with which a run would stop; None if it would not."""
        return next((one.problem for one in self.surveys if one.problem is not None), None)

    @property
    def findings(self) -> list[Finding]:
        """All findings, with their severity, count and rows."""
        return [finding for one in self.surveys for finding in one.findings]

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return preformatted(self.text)


def _pages(chat: StageChat | None, surveys: Sequence[Survey], notices: Sequence[str]) -> str:
    from tandem.check.check_page import print_survey

    tokenizer = f"{chat.model}, template {chat.template}" if chat else None

    def write(console: Console) -> None:
        for notice in notices:
            console.print(notice, markup=False, soft_wrap=True)
        for one in surveys:
            print_survey(console, one, tokenizer)

    return printed(write)


def _chat(
    model: Model | None, recipe: Recipe | None, chat_template: str | None
) -> StageChat | None:
    """The tokenizer and template of a model or a recipe; None without either."""
    from tandem.check.inputs import stage_chat

    if model is None and recipe is None:
        if chat_template is not None:
            raise UserError("check(): chat_template needs model or recipe: a tokenizer renders it")
        return None
    template = chat_template or (recipe.chat_template if recipe else None)
    added = recipe.added_tokens if recipe else ()
    if model is not None:
        return stage_chat(path_of(model, "check"), None, template, added)
    assert recipe is not None
    first = recipe.sft or recipe.dpo
    full = first is not None and first.full
    return stage_chat(recipe.model, recipe.model_revision, template, added, full=full)


def _targets(
    data: Data | None, recipe: Recipe | None, stage: TrainingStageName | None, folder: Path
) -> tuple[Sequence[CheckTarget], Sequence[str]]:
    """What each stage would read, and notices; see `cli/inspected_data.py`."""
    from tandem.check.inputs import KINDS, by_kind, left_out, recipe_data, stage_data, stage_of

    notices: list[str] = []
    if data is None:
        assert recipe is not None
        if stage is None:
            targets, notices = recipe_data(recipe, folder)
        else:
            targets = [stage_data(stage, recipe, None, folder)]
        return targets, [*notices, *left_out(targets)]
    sources = _sources(data, folder)
    if stage is not None:
        targets = [stage_data(stage, recipe, sources, folder)]
    else:
        parts, unknown = by_kind(sources)
        notices = [
            f"{source.path} is of no known format, and read as {KINDS['sft']}; if it holds "
            f"{KINDS['dpo']}, give stage='dpo'"
            for source in unknown
        ]
        targets = [stage_data(stage_of(kind), recipe, some, folder) for kind, some in parts.items()]
    return targets, [*notices, *left_out(targets)]


def _sources(data: Any, folder: Path) -> list[DataSource]:
    from tandem.data.resolve_sources import resolve_sources

    pieces = [piece.in_folder(folder, "check") for piece in named_data(data, "check")]
    stated = [validated(DataSource, piece, "check()") for piece in pieces]
    return resolve_sources(stated, folder, Recipe.model_fields["seed"].default)
