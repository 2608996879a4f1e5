"""What `tandem check` and `tandem show` read: the data of stages, and a model's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tandem.check.survey_result import CheckTarget
from tandem.data.batching.sampler import StepSampler
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.formats.format import Kind
from tandem.data.formats.known_formats import detect, format_called
from tandem.data.resolve_sources import held_out_sources, resolve_sources
from tandem.data.sources.chunks import Row
from tandem.data.sources.rows import not_read, read_rows
from tandem.data.text.contamination import Other, read_other
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.tokenize.vocabulary import add_tokens, row_notices
from tandem.data.truncation.limits import Limits
from tandem.errors import UserError
from tandem.recipe.choices import TrainingStageName
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.flags.flag import named_data
from tandem.recipe.recipe import Recipe
from tandem.recipe.training_settings import SftSettings, TrainingSettings
from tandem.recipe.unmeant import unmeant
from tandem.storage.run_folder import made_pairs, stage_folder

_ROWS = 20  # parsable rows that may tell a kind; the readers look at no more


def by_kind(sources: Sequence[DataSource]) -> tuple[dict[Kind, list[DataSource]], list[DataSource]]:
    """Return the sources of each kind in order, and those with rows of no known format.

    These, and sources without a readable row, count as conversations: reading them reports the
    error.
    """
    sources_of: dict[Kind, list[DataSource]] = {}
    unknown: list[DataSource] = []
    for source in sources:
        kind, rows = _look(source)
        sources_of.setdefault(kind or "conversations", []).append(source)
        if kind is None and rows:
            unknown.append(source)
    return sources_of, unknown


def _look(source: DataSource) -> tuple[Kind | None, int]:
    """Return the kind of a source's first rows, and how many of them were needed."""
    if source.format is not None:
        return format_called(source.format).kind, 0
    rows = 0
    with suppress(UserError):
        for row in islice((row for row in read_rows(source) if isinstance(row, Row)), _ROWS):
            rows += 1
            known = detect(row.fields)
            if known is not None:
                return known.kind, rows
    return None, rows


KINDS: dict[TrainingStageName, Kind] = {"sft": "conversations", "dpo": "preference pairs"}
_NO_LIMIT = 2**31 - 1


class NotMade(UserError):  # noqa: N818 - named as Stopped is
    """Another stage has to make a stage's data first."""


@dataclass(frozen=True)
class StageChat:
    """A model's tokenizer and template as a stage would use them.

    `model` and `template` are names, `folder` is the model's, `chat` encodes, `special` are the
    tokenizer's special tokens; `notices` are for the user; `context` is how many tokens the model
    was made for, None where nothing says it.
    """

    model: str
    folder: Path
    template: str
    chat: ChatTokenizer
    special: tuple[str, ...]
    notices: tuple[str, ...]
    context: int | None


def doubts_of(stage: str, recipe: Recipe, records: int) -> list[str]:
    """Return warnings of a stage's settings without effect, for a number of training examples."""
    settings = {"sft": recipe.sft, "dpo": recipe.dpo}[stage]
    if settings is None or not records:
        return []
    steps = StepSampler(records, settings.batch_size).total_steps(settings)
    return [f"{stage}: {doubt}" for doubt in unmeant(settings, steps=steps, records=records)]


def named_sources(
    paths: Sequence[str],
    folder: Path,
    seed: int | None,
    settings: Mapping[str, object] | None = None,
) -> list[DataSource]:
    """Return sources for files, folders, Hub ids or `demo:NAME`, which is written into `folder`.

    `settings` are those of each data set. Raises UserError for settings that a recipe cannot have.
    """
    seed = Recipe.model_fields["seed"].default if seed is None else seed
    return resolve_sources(named_data(paths, settings or {}), folder, seed)


def stage_of(kind: Kind) -> TrainingStageName:
    """Return the stage that trains on records of a kind."""
    return next(stage for stage, its in KINDS.items() if its == kind)


def stage_data(
    stage: TrainingStageName,
    recipe: Recipe | None,
    sources: Sequence[DataSource] | None,
    folder: Path,
) -> CheckTarget:
    """Return what a stage reads; without a recipe, with the stage's defaults and no limits.

    `sources` replace the recipe's own data; demo data is written into `folder`. Raises UserError
    when the recipe lacks the stage, NotMade when its data is not made yet.
    """
    settings = None if recipe is None else _settings(recipe, stage)
    if recipe is not None and settings is None:
        raise UserError(f"recipe {recipe.name} has no {stage} section; name another --stage")
    if sources is None:
        if recipe is None or settings is None:
            raise UserError("no data is named; give it, or a --recipe that names it")
        sources = _own_sources(stage, recipe, settings, folder)
    held_out: list[DataSource] = []
    if settings is not None and recipe is not None:
        held_out = held_out_sources(settings, sources, folder, recipe.seed)
    return CheckTarget(
        stage,
        tuple(sources),
        options_of(KINDS[stage] if settings is None else settings.trains_on, settings),
        _setting(stage, settings, "max_dropped"),
        validation=tuple(held_out),
        limited=settings is not None,
    )


def recipe_data(recipe: Recipe, folder: Path) -> tuple[list[CheckTarget], list[str]]:
    """Return what each training stage of a recipe reads, and messages of data not made yet.

    `folder` is for the embedded demo's data. Raises UserError when there is no data.
    """
    targets: list[CheckTarget] = []
    missing: list[NotMade] = []
    for stage in KINDS:
        if _settings(recipe, stage) is None:
            continue
        try:
            targets.append(stage_data(stage, recipe, None, folder))
        except NotMade as error:
            missing.append(error)
    if not targets and missing:
        raise missing[0]
    if not targets:
        raise UserError(
            f"recipe {recipe.name} has neither an sft nor a dpo section, whose data could be "
            "looked at; name a file"
        )
    return targets, [str(error) for error in missing]


def with_validation(targets: Sequence[CheckTarget]) -> list[CheckTarget]:
    """Return what stages read, each followed by the data sets that it holds out, if any."""
    parts: list[CheckTarget] = []
    for target in targets:
        held_out = replace(target, sources=target.validation, validation=(), held_out=True)
        parts += [part for part in (target, held_out) if part.sources]
    return parts


def left_out(targets: Sequence[CheckTarget]) -> list[str]:
    """Return a line on each folder of which stages leave files out; reading reports errors."""
    sources = [source for target in with_validation(targets) for source in target.sources]
    with suppress(UserError):
        return not_read(sources)
    return []


def options_of(kind: Kind, settings: TrainingSettings | None) -> EncodingOptions:
    """Return how a stage's settings encode records; without settings nothing is cut."""
    if settings is not None:
        return EncodingOptions.of(kind, settings)
    on_bad_record = _setting(stage_of(kind), None, "on_bad_record")
    return EncodingOptions(kind, Limits(_NO_LIMIT, None), on_bad_record, documents=True)


def stage_chat(
    model: str,
    revision: str | None,
    chat_template: str | None,
    added_tokens: Sequence[str] = (),
    *,
    full: bool = False,
) -> StageChat:
    """Return a model's tokenizer with its template; weights are not fetched.

    `full` says that all weights are trained, and with them rows that never were.
    The model is a folder, a Hub id or `demo:base`; a folder with only a tokenizer is enough. Raises
    UserError as a training stage would.
    """
    # Here, for looking at texts alone does without.
    from tandem.model.model_folder import (
        context_length,
        described_rows,
        model_folder,
        read_config,
        read_tokenizer,
        stated_config,
    )
    from tandem.model.untrained_rows import in_words, untrained_tokens

    folder = model_folder(model, revision, weights=False)
    tokenizer = read_tokenizer(folder)
    added = add_tokens(tokenizer, added_tokens)
    template = resolve_template(tokenizer, chat_template)
    rows, context, notices = None, None, template.notices
    if (folder / "config.json").is_file():
        config = stated_config(folder) or read_config(folder)
        rows, context = described_rows(config, added), context_length(config)
        notices += row_notices(tokenizer, rows)
        if not full:
            untrained = untrained_tokens(folder, config, tokenizer, template, added.ids)
            notices += tuple(words for words in (in_words(untrained),) if words)
    special = tuple(str(token) for token in tokenizer.all_special_tokens)
    chat = ChatTokenizer.of(tokenizer, template, rows)
    return StageChat(model, folder, template.name, chat, special, notices, context)


def require_context(chat: StageChat, target: CheckTarget) -> None:
    """Raise UserError when a stage's limit is beyond the model's context, if that is known."""
    from tandem.model import model_folder

    if target.limited:
        limit = target.options.limits.sequence
        model_folder.require_context(chat.context, limit, chat.folder, "max_length")


def other_sets(
    target: CheckTarget, recipe: Recipe | None, against: Sequence[str], folder: Path
) -> list[Other]:
    """Read the sets with which a stage's data should share nothing.

    Those are its validation data, what the recipe evaluates on, and the sets that are named; none
    for data that is held out itself. Raises UserError for one that cannot be read.
    """
    if target.held_out:
        return []
    evaluated: list[DataSource] = []
    if recipe is not None and (settings := recipe.evaluate) is not None:
        sources = [*settings.questions, *settings.pairs, *settings.heldout]
        evaluated = resolve_sources(sources, folder, recipe.seed)
    named = named_sources(against, folder, recipe.seed if recipe else None)
    # Records of one kind share words of their form: of validation data only whole prompts count.
    return [
        *(read_other(source, runs=False) for source in target.validation),
        *(read_other(source) for source in (*evaluated, *named)),
    ]


def _settings(recipe: Recipe, stage: TrainingStageName) -> TrainingSettings | None:
    return recipe.sft if stage == "sft" else recipe.dpo


def _own_sources(
    stage: TrainingStageName, recipe: Recipe, settings: TrainingSettings, folder: Path
) -> list[DataSource]:
    if settings.data:
        return resolve_sources(settings.data, folder, recipe.seed)
    made = stage_folder(recipe.output_dir, "pairs")
    for number in range(recipe.rounds, 0, -1):  # those that were made last
        pairs = made_pairs(stage_folder(recipe.output_dir, "pairs", number))
        if pairs is not None:
            return [DataSource(path=str(pairs))]
    raise NotMade(
        f"recipe {recipe.name}: {stage}.data is what its pairs stage makes, and there are none in "
        f"{made} yet. Run it until then (tandem run ... --until pairs), or name a file."
    )


def _setting(stage: TrainingStageName, settings: TrainingSettings | None, name: str) -> Any:
    """Return a setting, or its default without settings."""
    if settings is not None:
        return getattr(settings, name)
    section = SftSettings if stage == "sft" else DpoSettings
    return section.model_fields[name].default
