"""Before the first stage: what a later one would stumble over after hours of work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from functools import partial
from pathlib import Path

from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.encoded.worker_pool import EncodingWork, encoded_chunks
from tandem.data.formats.conversations import Question
from tandem.data.formats.format import Kind
from tandem.data.ledger import Ledger
from tandem.data.read_records import formatted_chunks, read_pairs, read_questions
from tandem.data.resolve_sources import check_format, held_out_of
from tandem.data.sources.rows import count_sources, local_files, looks_like_path
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.tokenize.template_omissions import check_asked
from tandem.data.tokenize.vocabulary import add_tokens, tokens_without_row
from tandem.data.truncation.limits import Limits
from tandem.pairs.prompts import read_prompts
from tandem.recipe.data_source import DataSource
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.recipe import Recipe
from tandem.recipe.training_settings import TrainingSettings
from tandem.storage.atomic_files import read_json

# Of a sequence, where a model's own does not matter.
_NO_LIMIT = 2**31 - 1


def check_inputs(recipe: Recipe, wanted: Set[str]) -> None:
    """Look for the data and models that a run will need.

    Data on the Hub, and the embedded demo's, is looked for when its stage comes.

    Args:
        recipe: the resolved recipe.
        wanted: names of the stages that are to run.

    Raises UserError for local data that is not there, rows of a later stage that would stop it, a
    folder that is no model, lengths beyond the base model's context, adapters on layers that it
    does not have, and what `check_tokens` raises.
    """
    for source in _data(recipe, wanted):
        if _is_local(source.path):
            local_files(source.path, source.split)
    _check_rows(recipe, wanted)
    _check_trained(recipe, wanted)
    # A training stage that comes first encodes its own data before anything else.
    check_tokens(recipe, wanted - {"sft"})
    if recipe.evaluate is not None and "evaluate" in wanted:
        _check_tasks(recipe.evaluate)
    if recipe.pairs is not None and "pairs" in wanted:
        from tandem.pairs.make_pairs import check_pairs

        check_pairs(recipe.pairs, recipe)


def _data(recipe: Recipe, wanted: Set[str]) -> list[DataSource]:
    found: list[DataSource] = []
    held_out: list[DataSource] = []
    for section in _trained(recipe, wanted):
        found += section.data
        held_out += held_out_of(section, _named(section.data), _named)
    if recipe.pairs is not None and "pairs" in wanted:
        pairs = recipe.pairs
        found += [*pairs.prompts, *pairs.heldout, *pairs.select.decontaminate]
    if recipe.evaluate is not None and "evaluate" in wanted:
        found += [
            *recipe.evaluate.questions,
            *recipe.evaluate.pairs,
            *recipe.evaluate.heldout,
        ]
    return [*_named(found), *held_out]


def _check_rows(recipe: Recipe, wanted: Set[str]) -> None:
    """Read what comes after the first training stage; that one reads its own data at once."""
    if recipe.dpo is not None and {"sft", "dpo"} <= wanted:
        ledger = Ledger(None)
        for _ in read_pairs(_specs(recipe.dpo.data), ledger, recipe.dpo.on_bad_record):
            ledger.trained()
        ledger.check_share(recipe.dpo.max_dropped)
        held_out = held_out_of(recipe.dpo, _specs(recipe.dpo.data), _specs)
        for _ in read_pairs(held_out, Ledger(None), recipe.dpo.on_bad_record):
            pass
    if recipe.pairs is not None and "pairs" in wanted:
        making = recipe.pairs
        for spec in _specs([*making.prompts, *making.heldout]):
            # The first one tells what kind of records they are.
            next(read_prompts([spec], making.keep, Ledger(None), making.on_bad_record), None)
    if recipe.evaluate is not None and "evaluate" in wanted:
        if questions := _specs(recipe.evaluate.questions):
            _check_asked(recipe, read_questions(questions))
        for _ in read_pairs(_specs(recipe.evaluate.pairs), Ledger(None)):
            pass


def _check_asked(recipe: Recipe, questions: Sequence[Question]) -> None:
    """Raise UserError for a question that a template of the run does not render whole.

    Only a local model is looked at.
    """
    if not _is_local(recipe.model) or not any(len(one.turns) > 1 for one in questions):
        return
    from tandem.model.model_folder import load_tokenizer, model_folder

    tokenizer = load_tokenizer(model_folder(recipe.model))
    add_tokens(tokenizer, recipe.added_tokens)
    # The base is asked in its own template, if it has one, and the others in the run's.
    own = tokenizer.chat_template
    choices = {recipe.chat_template, None} if own else {recipe.chat_template}
    for choice in choices:
        tokenizer.chat_template = own
        template = resolve_template(tokenizer, choice)
        check_asked(tokenizer, template, questions, recipe.model)


def check_tokens(recipe: Recipe, wanted: Set[str]) -> None:
    """Raise UserError for records with a token that the base model has no row for.

    Only a local model and local data are looked at, and only where the model's tokenizer has more
    tokens than the model has rows.

    Args:
        recipe: the resolved recipe.
        wanted: names of the stages whose data counts.
    """
    if not _is_local(recipe.model) or not _has_more_tokens(Path(recipe.model).expanduser()):
        return
    from tandem.model.added_tokens import described_rows
    from tandem.model.model_folder import load_config, load_tokenizer, model_folder

    folder = model_folder(recipe.model)
    tokenizer = load_tokenizer(folder)
    rows = described_rows(load_config(folder), add_tokens(tokenizer, recipe.added_tokens))
    if not tokens_without_row(tokenizer, rows):
        return
    chat = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, recipe.chat_template), rows)
    for kind, named in _encoded(recipe, wanted):
        specs = _specs(named)
        # Piece by piece, and none is kept: data may be larger than memory.
        options = EncodingOptions(kind, Limits(_NO_LIMIT, None), "drop")
        chunks = formatted_chunks(specs, kind, Ledger(None), "drop")
        doing, total = "looking for tokens without a row", partial(count_sources, specs)
        for _ in encoded_chunks(chunks, chat, options, doing, total, EncodingWork()):
            pass


def _encoded(recipe: Recipe, wanted: Set[str]) -> Iterator[tuple[Kind, Sequence[DataSource]]]:
    """What becomes tokens of a run's records, as far as readers of both kinds take it."""
    if recipe.sft is not None and "sft" in wanted:
        yield "conversations", recipe.sft.data
    if recipe.dpo is not None and "dpo" in wanted:
        yield "preference pairs", recipe.dpo.data
    if recipe.evaluate is not None and "evaluate" in wanted:
        yield "preference pairs", recipe.evaluate.pairs
        yield "conversations", recipe.evaluate.heldout


def _has_more_tokens(folder: Path) -> bool:
    """Whether a model's tokenizer.json has ids beyond its configuration's vocab_size."""
    try:
        config = read_json(folder / "config.json")
        found = read_json(folder / "tokenizer.json")
        rows = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
        vocabulary = found["model"]["vocab"]
        ids = [len(vocabulary) - 1, *(token["id"] for token in found["added_tokens"])]
        if isinstance(vocabulary, dict):
            ids += vocabulary.values()
        return bool(max(ids) >= rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # said by who loads them


def _check_tasks(settings: EvaluationSettings) -> None:
    """That the harness is there, the data of its tasks, where they are local, and a judge's key."""
    if settings.tasks or settings.suite:
        from tandem.evaluate.harness_tasks import check_harness, selected_tasks

        check_harness(selected_tasks(settings))
    if settings.judge is not None:
        from tandem.integrations.chat_server import open_server

        open_server(settings.judge, lambda _: None)


def _specs(sources: Sequence[DataSource]) -> list[DataSource]:
    return [spec for spec in _named(sources) if _is_local(spec.path)]


def _named(sources: Sequence[DataSource]) -> list[DataSource]:
    for source in sources:
        check_format(source)
    return list(sources)


def _is_local(name: str) -> bool:
    return not name.startswith("demo:") and looks_like_path(name)


def _trained(recipe: Recipe, wanted: Set[str]) -> list[TrainingSettings]:
    return [section for name, section in _sections(recipe).items() if name in wanted]


def _sections(recipe: Recipe) -> dict[str, TrainingSettings]:
    """The training stages of a recipe, in order."""
    sections = {"sft": recipe.sft, "dpo": recipe.dpo}
    return {name: section for name, section in sections.items() if section is not None}


def _check_trained(recipe: Recipe, wanted: Set[str]) -> None:
    """Of a model on the Hub the configuration is fetched, if a wanted stage begins with it."""
    from tandem.model.base_model import check_base
    from tandem.model.model_folder import check_fetchable, model_folder

    begins = next(iter(_sections(recipe)), None)
    sections = {name: s for name, s in _sections(recipe).items() if name in wanted}
    if sections and (begins in wanted or _is_local(recipe.model)):
        folder = model_folder(recipe.model, recipe.model_revision, weights=False)
        if looks_like_path(recipe.model) or recipe.model.startswith("demo:"):
            check_base(folder, sections, weights=_is_local(recipe.model))
            return
        check_fetchable(recipe.model, folder, recipe.model_revision)
        check_base(folder, sections, weights=False)
