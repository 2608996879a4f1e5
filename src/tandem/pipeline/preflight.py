"""Checks before the first stage for what would stop a later one after hours of work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from functools import partial
from pathlib import Path

from tandem.data.formats.conversations import Question
from tandem.data.formats.format import Kind
from tandem.data.ledger import Ledger
from tandem.data.read_records import (
    formatted_chunks,
    holds_tokens,
    read_pairs,
    read_questions,
    read_records,
)
from tandem.data.resolve_sources import check_format, held_out_of
from tandem.data.sources.rows import count_sources, is_local, local_files
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.vocabulary import add_tokens, tokens_without_row
from tandem.integrations.trackers import check_tracker
from tandem.losses.custom import is_custom
from tandem.model.model_folder import (
    check_fetchable,
    check_lengths,
    described_rows,
    known_config,
    model_folder,
    on_hub,
    read_tokenizer,
)
from tandem.recipe.data_source import DataSource
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.recipe import Recipe, stages_of
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.user_code import load_function
from tandem.storage.atomic_files import read_json

# A length limit where the model's own does not matter.
_NO_LIMIT = 2**31 - 1


def check_paths(recipe: Recipe, *, weights: bool = True) -> None:
    """Look for the local data and the local base model of a recipe, without torch or transformers.

    `weights` says whether the model must have any. Raises UserError for data that is not there, a
    folder that is no model, and lengths beyond the context that its configuration states.
    """
    for source in _local(_sources(recipe)):
        local_files(source.path, source.split)
    named = {"sft": recipe.sft, "dpo": recipe.dpo}
    lengths = {f"{name}.max_length": each.max_length for name, each in named.items() if each}
    if lengths and not on_hub(recipe.model):
        check_lengths(model_folder(recipe.model), lengths, weights=weights)


def check_inputs(recipe: Recipe, wanted: Set[str], finished: Set[str] = frozenset()) -> None:
    """Look for the data, models and servers that the `wanted` stages of a resolved recipe need.

    Stages are named as in `stages_of`. The data of those that are `finished` is not read again, and
    a server is asked one question only if a stage that asks it is not.

    Raises UserError for local data that is not there, rows of a later stage that would stop it, a
    folder that is no model, lengths beyond the base model's context, adapters on layers that it
    does not have, optimizers that do not fit the engine, a server that does not answer, and what
    `check_tokens` raises.
    """
    sections = {"sft", "pairs", "dpo", "evaluate"}
    needed = _works(recipe, wanted)
    check_paths(recipe.model_copy(update=dict.fromkeys(sections - needed)))
    to_do = _works(recipe, wanted - finished)
    asked = recipe.model_copy(update=dict.fromkeys(sections - to_do))
    _check_optimizers(asked)
    _check_losses(asked)
    _check_watching(asked)
    _check_rows(asked)
    _check_trained(asked, begins=recipe.sft or recipe.dpo)
    # A training stage that comes first encodes its own data before anything else.
    check_tokens(asked.model_copy(update={"sft": None}))
    if asked.evaluate is not None:
        _check_tasks(asked.evaluate)
    if asked.pairs is not None:
        from tandem.pairs.check_pairs import check_pairs

        check_pairs(asked.pairs, recipe)


def check_training(recipe: Recipe) -> None:
    """Look for what would stop the DPO stage of a recipe, but for its data.

    Raises UserError for adapters on layers that the base model does not have, and for optimizers
    that do not fit the engine.
    """
    asked = recipe.model_copy(update=dict.fromkeys(("sft", "pairs", "evaluate")))
    _check_optimizers(asked)
    _check_trained(asked, begins=recipe.sft or recipe.dpo)


def _works(recipe: Recipe, names: Set[str]) -> set[str]:
    """What the stages of some names do, whatever their round."""
    return {stage.stage.work for stage in stages_of(recipe) if stage.name in names}


def _sources(asked: Recipe) -> list[DataSource]:
    """All data that a recipe names."""
    sources: list[DataSource] = []
    for section in filter(None, (asked.sft, asked.dpo)):
        sources += [*section.data, *held_out_of(section, section.data, list)]
    if asked.pairs is not None:
        pairs = asked.pairs
        sources += [*pairs.prompts, *pairs.heldout, *pairs.select.decontaminate]
    if asked.evaluate is not None:
        evaluate = asked.evaluate
        sources += [*evaluate.questions, *evaluate.pairs, *evaluate.heldout]
    return sources


def _check_rows(asked: Recipe) -> None:
    """Read what comes after the first training stage; that one reads its own data at once."""
    if asked.sft is not None and asked.dpo is not None:
        dpo, ledger = asked.dpo, Ledger(None)
        for _ in read_records(_local(dpo.data), dpo.trains_on, ledger, dpo.on_bad_record):
            ledger.trained()
        ledger.check_share(dpo.max_dropped)
        held_out = held_out_of(dpo, _local(dpo.data), _local)
        for _ in read_records(held_out, dpo.trains_on, Ledger(None), dpo.on_bad_record):
            pass
    if asked.pairs is not None:
        from tandem.pairs.prompts import read_prompts

        making = asked.pairs
        for source in _local([*making.prompts, *making.heldout]):
            # The first record shows which kind they are.
            next(read_prompts([source], making.keep, Ledger(None), making.on_bad_record), None)
    if asked.evaluate is not None:
        if questions := _local(asked.evaluate.questions):
            _check_asked(asked, read_questions(questions))
        for _ in read_pairs(_local(asked.evaluate.pairs), Ledger(None)):
            pass


def _check_asked(recipe: Recipe, questions: Sequence[Question]) -> None:
    """Raise UserError for a question that a template of a local model does not render whole."""
    if not is_local(recipe.model) or not any(len(one.turns) > 1 for one in questions):
        return
    from tandem.data.tokenize.template_omissions import check_asked

    tokenizer = read_tokenizer(model_folder(recipe.model))
    add_tokens(tokenizer, recipe.added_tokens)
    # The base is asked in its own template, if it has one, and the others in the run's.
    own = tokenizer.chat_template
    choices = {recipe.chat_template, None} if own else {recipe.chat_template}
    for choice in choices:
        tokenizer.chat_template = own
        template = resolve_template(tokenizer, choice)
        check_asked(tokenizer, template, questions, recipe.model)


def check_tokens(recipe: Recipe) -> None:
    """Raise UserError for local records with a token that a local base model has no row for."""
    if not is_local(recipe.model):
        return
    wanted = [(kind, _local(named)) for kind, named in _encoded(recipe)]
    # Rows of tokens may be of any other vocabulary.
    of_tokens = [
        (kind, [source for source in sources if holds_tokens(source, kind)])
        for kind, sources in wanted
    ]
    if not _has_more_tokens(Path(recipe.model).expanduser()):
        wanted = of_tokens
    if not any(sources for _, sources in wanted):
        return
    folder = model_folder(recipe.model)
    tokenizer = read_tokenizer(folder)
    rows = described_rows(known_config(folder), add_tokens(tokenizer, recipe.added_tokens))
    if not tokens_without_row(tokenizer, rows):
        wanted = of_tokens
    from tandem.data.encoded.encode_chunk import EncodingOptions
    from tandem.data.encoded.worker_pool import EncodingWork, encoded_chunks
    from tandem.data.tokenize.encode import ChatTokenizer
    from tandem.data.truncation.limits import Limits

    chat = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, recipe.chat_template), rows)
    for kind, sources in wanted:
        # Chunk by chunk, and none is kept: data may be larger than memory.
        options = EncodingOptions(kind, Limits(_NO_LIMIT, None), "drop", documents=True)
        chunks = formatted_chunks(sources, kind, Ledger(None), "drop")
        doing, total = "looking for tokens without a row", partial(count_sources, sources)
        for _ in encoded_chunks(chunks, chat, options, doing, total, EncodingWork()):
            pass


def _encoded(recipe: Recipe) -> Iterator[tuple[Kind, Sequence[DataSource]]]:
    """The records of a run that become tokens, as far as readers of both kinds take them."""
    if recipe.sft is not None:
        yield "conversations", recipe.sft.data
    if recipe.dpo is not None:
        yield recipe.dpo.trains_on, recipe.dpo.data
    if recipe.evaluate is not None:
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
    """Check that the harness, the local data of its tasks and a judge's key are there."""
    if settings.tasks or settings.suite:
        from tandem.evaluate.harness_tasks import check_harness, selected_tasks

        check_harness(selected_tasks(settings))
    if settings.judge is not None:
        from tandem.integrations.chat_server import ChatServer

        ChatServer(settings.judge)


def _check_optimizers(asked: Recipe) -> None:
    """Raise UserError for an optimizer that a later stage could not use."""
    named = {section.optimizer for section in (asked.sft, asked.dpo) if section is not None}
    if named - {"adamw"}:  # which works everywhere
        from tandem.integrations.choose import device_of, pieces_of
        from tandem.train.optimizers import check_optimizer

        for name in sorted(named):
            check_optimizer(name, pieces_of(asked.engine), asked.engine, device_of(asked))


def _check_losses(asked: Recipe) -> None:
    """Raise UserError for a loss of the user's own that could not be trained with."""
    if asked.dpo is not None and any(map(is_custom, asked.dpo.losses)):
        from tandem.train.objectives.mixture import check_losses

        check_losses(asked.dpo)


def _check_watching(asked: Recipe) -> None:
    """Check the user's own callbacks, and trackers, if a stage is to be trained."""
    if asked.sft is None and asked.dpo is None:
        return
    for name in asked.callbacks:
        load_function(name, "callbacks")
    for tracker in asked.trackers:
        check_tracker(tracker)


def _local(sources: Sequence[DataSource]) -> list[DataSource]:
    """The sources on this machine; raises UserError for a stated format that does not exist."""
    for source in sources:
        check_format(source)
    return [source for source in sources if is_local(source.path)]


def _check_trained(asked: Recipe, begins: TrainingSettings | None) -> None:
    """Check the base model of the training stages; one on the Hub only if it `begins` the run."""
    from tandem.model.base_model import check_base

    named = {"sft": asked.sft, "dpo": asked.dpo}
    sections = {name: section for name, section in named.items() if section is not None}
    local = not on_hub(asked.model)
    if not sections or not (local or begins in sections.values()):
        return
    folder = model_folder(asked.model, asked.model_revision, weights=False)
    if not local:
        check_fetchable(asked.model, folder, asked.model_revision)
    check_base(folder, sections, weights=local)
    if local and begins in sections.values():
        from tandem.stages.training.adapter_checks import check_started_on

        assert begins is not None
        check_started_on(begins, asked.model, folder)
