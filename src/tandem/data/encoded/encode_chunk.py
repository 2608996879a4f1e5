"""Encode one chunk of a data set: from its rows to examples and ledger lines, in any process."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import TYPE_CHECKING

from tandem.data.encoded.dataset import FlatArrays, to_arrays
from tandem.data.encoded.encode_documents import document_ids, document_pieces, joined_pieces
from tandem.data.encoded.encode_tokens import checked_tokens, token_example
from tandem.data.encoded.example import Example, conversation_example, preference_example
from tandem.data.formats.format import Kind
from tandem.data.ledger import Entry
from tandem.data.read_records import not_answers, records_of
from tandem.data.records import (
    ChatRecord,
    Conversation,
    Document,
    Preference,
    Record,
    TokenPair,
    TokenRecord,
    TokenRow,
    prompt_key,
)
from tandem.data.sources.chunks import Chunk
from tandem.data.tokenize import encode, template_capabilities
from tandem.data.tokenize.encode import ChatTokenizer, Encoded, Exchange
from tandem.data.tokenize.template_capabilities import Refused, in_form
from tandem.data.truncation.conversation import fit_conversation, skip_old_turns
from tandem.data.truncation.limits import Fitted, Limits
from tandem.data.truncation.pair import fit_pair
from tandem.recipe.choices import LossOn, OnBadRecord

if TYPE_CHECKING:
    from tandem.recipe.training_settings import TrainingSettings


SPLIT = "a text longer than max_length is split into pieces, and nothing of it is lost"


@dataclass(frozen=True, slots=True)
class EncodingOptions:
    """How records are encoded, apart from tokenizer and template."""

    kind: Kind
    limits: Limits
    on_bad_record: OnBadRecord
    loss_on: LossOn = "answers"
    documents: bool = False  # whether rows of raw text may be among them, as with `loss_on: text`

    @classmethod
    def of(cls, kind: Kind, settings: TrainingSettings) -> EncodingOptions:
        """Return the options for records of a kind under a stage's settings."""
        limits = Limits(settings.max_length, settings.max_prompt_length, settings.too_long)
        loss_on: LossOn = getattr(settings, "loss_on", "answers")  # of SFT alone
        return cls(kind, limits, settings.on_bad_record, loss_on, loss_on == "text")


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk's examples, and an entry for each record that was cut, split or dropped, by row.

    `sizes` are how many examples each record has, where some have several.
    """

    file: str
    arrays: FlatArrays
    entries: tuple[Entry, ...]
    sizes: tuple[int, ...] = ()

    def records(self, examples: int) -> int:
        """Return of how many records the first `examples` are."""
        if not self.sizes:
            return examples
        return bisect_left(list(accumulate(self.sizes)), examples) + (examples > 0)

    @property
    def trained(self) -> int:
        """How many records have examples."""
        return self.records(len(self.arrays.parts))


def encode_chunk(
    chat: ChatTokenizer, options: EncodingOptions, chunk: Chunk, known: str
) -> EncodedChunk:
    """Read, encode and fit the records of a chunk, in the format with the id `known`.

    Raises `UserError` for rows or turns that stop a run.
    """
    parts = list(records_of(chunk, known, options.on_bad_record))
    return encode_records(chat, options, chunk.file, parts)


def encode_records(
    chat: ChatTokenizer, options: EncodingOptions, file: str, parts: Sequence[Record | Entry]
) -> EncodedChunk:
    """Encode and fit the records of a chunk of a file; the entries among them are kept.

    Raises `UserError` for turns that stop a run.
    """
    records = [one for one in parts if not isinstance(one, Entry)]
    fits = fit_records(chat, options, records)
    kept = [fit for fit in fits if fit.example is not None]
    sizes = tuple(len(fit.examples) for fit in kept)
    prompts = [key for fit in kept for key in [prompt_key(fit.record)] * len(fit.examples)]
    arrays = to_arrays([example for fit in kept for example in fit.examples], prompts)
    return EncodedChunk(
        file, arrays, entries_of(parts, fits), sizes if sum(sizes) > len(sizes) else ()
    )


def entries_of(parts: Sequence[Record | Entry], fits: Sequence[FitRecord]) -> tuple[Entry, ...]:
    """Return the entries among a chunk's parts, and those of its records once fitted, by row."""
    entries = [one for one in parts if isinstance(one, Entry)]
    entries += [fit.entry for fit in fits if fit.entry is not None]
    return tuple(sorted(entries, key=lambda entry: entry.row))


@dataclass(frozen=True, slots=True)
class FitRecord:
    """What became of a record, which has its tool calls as the template takes them.

    `example` is None for a dropped one; `entry` says why it was cut or dropped. Then `uncut` are
    its answers before that, where all of them were encoded whole.
    """

    record: Record
    example: Example | None
    entry: Entry | None = None
    uncut: tuple[Encoded, ...] = ()
    later: tuple[Example, ...] = ()  # the other pieces of a document that was split

    @property
    def examples(self) -> tuple[Example, ...]:
        """All examples of the record."""
        return () if self.example is None else (self.example, *self.later)

    @property
    def joined(self) -> Example | None:
        """The example, or the pieces of a document as one."""
        return joined_pieces(self.examples) if self.later else self.example


def fit_records(
    chat: ChatTokenizer, options: EncodingOptions, records: Sequence[Record]
) -> list[FitRecord]:
    """Encode and fit some records; raise `UserError` for what stops a run."""
    require_answers(options, records)
    documents = [one for one in records if isinstance(one, Document)]
    whole = iter(_fit_documents(chat, options, documents))
    rendered = [one for one in records if isinstance(one, Conversation | Preference)]
    fits = iter(_fit_chats(chat, options, rendered))
    return [
        _fit_tokens(chat, options, record)
        if isinstance(record, TokenRow | TokenPair)
        else next(whole if isinstance(record, Document) else fits)
        for record in records
    ]


def require_answers(options: EncodingOptions, records: Sequence[Record]) -> None:
    """Raise `UserError` for a text alone, unless all of it may be trained."""
    document = next((one for one in records if isinstance(one, Document)), None)
    if document is not None and not options.documents:
        raise not_answers(document)


def _fit_documents(
    chat: ChatTokenizer, options: EncodingOptions, documents: Sequence[Document]
) -> list[FitRecord]:
    fits, most = [], options.limits.sequence
    encoded = document_ids(chat.codec, documents)
    for document, ids in zip(documents, encoded, strict=True):
        pieces = document_pieces(ids, most, document.origin)
        if isinstance(pieces, Refused):
            fits.append(_dropped(document, pieces))
            continue
        entry = None
        if len(pieces) > 1:
            detail = f"{len(ids)} tokens in {len(pieces)} pieces, max_length {most}"
            entry = Entry.split(document.origin, SPLIT, detail)
        fits.append(FitRecord(document, pieces[0], entry, later=tuple(pieces[1:])))
    return fits


def _fit_tokens(chat: ChatTokenizer, options: EncodingOptions, record: TokenRecord) -> FitRecord:
    fitted = checked_tokens(chat, record, options.limits)
    if isinstance(fitted, Refused):
        return _dropped(record, fitted)
    example = token_example(fitted.record)
    if not fitted.reason:
        return FitRecord(record, example)
    entry = Entry.truncated(record.origin, fitted.reason, fitted.detail)
    return FitRecord(record, example, entry)


def _fit_chats(
    chat: ChatTokenizer, options: EncodingOptions, records: Sequence[ChatRecord]
) -> list[FitRecord]:
    records = [_in_form(chat, record) for record in records]
    prepared = [_prepare(chat, options, record) for record in records]
    # All answers in one call of the tokenizer.
    wanted = [one for some in prepared if not isinstance(some, Refused) for one in some.exchanges]
    encoded = iter(encode.encode_exchanges(chat, wanted, options.limits.sequence))
    fits = []
    for record, ready in zip(records, prepared, strict=True):
        if isinstance(ready, Refused):
            fits.append(_dropped(record, ready))
            continue
        own = ready.answers(chat, options, encoded)
        fitted = ready.fit(chat, options, own)
        uncut = () if ready.record is not record else _whole(own)
        if isinstance(fitted, Refused):
            fits.append(_dropped(record, fitted, uncut))
            continue
        example = example_of(record, fitted.encoded)
        if fitted.reason:
            entry = Entry.truncated(record.origin, fitted.reason, fitted.detail)
            fits.append(FitRecord(record, example, entry, uncut))
        else:
            fits.append(FitRecord(record, example))
    return fits


def example_of(record: ChatRecord, answers: Sequence[Encoded]) -> Example:
    """Return the example of a record's encoded answers."""
    if isinstance(record, Conversation):
        scores = () if record.good is None else (float(record.good),)
        return replace(conversation_example(answers, record.origin), scores=scores)
    return replace(preference_example(answers, record.origin), scores=record.scores)


def _whole(answers: Sequence[Encoded | Refused]) -> tuple[Encoded, ...]:
    """Return answers that were all encoded, and whole; none otherwise."""
    whole = tuple(one for one in answers if not isinstance(one, Refused) and one.whole)
    return whole if len(whole) == len(answers) else ()


def _dropped(record: Record, reason: Refused, uncut: tuple[Encoded, ...] = ()) -> FitRecord:
    entry = Entry.dropped(record.origin, reason.reason, reason.detail)
    return FitRecord(record, None, entry, uncut)


def _in_form(chat: ChatTokenizer, record: ChatRecord) -> ChatRecord:
    """Return the record with its tool calls as the template takes them."""
    capabilities = chat.capabilities(record.tools)
    if isinstance(record, Conversation):
        return replace(record, turns=in_form(capabilities, record.turns))
    return replace(record, prompt=in_form(capabilities, record.prompt))


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A record, and the answers of it that are encoded together with other records' answers.

    A conversation may have lost `dropped` old exchanges already.
    """

    record: ChatRecord
    exchanges: Sequence[Exchange]
    dropped: int = 0

    def answers(
        self, chat: ChatTokenizer, options: EncodingOptions, encoded: Iterator[Encoded | Refused]
    ) -> list[Encoded | Refused]:
        """Return the record's answers, which are the next of `encoded`, or its whole text."""
        own = list(islice(encoded, len(self.exchanges)))
        if isinstance(self.record, Conversation) and options.loss_on == "text":
            return [encode.encode_text(chat, self.record, options.limits.sequence)]
        return own

    def fit(
        self, chat: ChatTokenizer, options: EncodingOptions, own: Sequence[Encoded | Refused]
    ) -> Fitted | Refused:
        """Return the record, with its answers, within its limits."""
        record, limits = self.record, options.limits
        if isinstance(record, Preference):
            return fit_pair(chat, record, own, limits)
        return fit_conversation(chat, record, own, limits, options.loss_on, self.dropped)


def _prepare(
    chat: ChatTokenizer, options: EncodingOptions, record: ChatRecord
) -> _Prepared | Refused:
    """Return what can be encoded of a record, or why it cannot be trained."""
    on_answers = options.loss_on == "answers"
    capabilities = chat.capabilities(record.tools)
    named = f"chat_template: {chat.template.name}"
    reason = template_capabilities.reason_unsupported(capabilities, record)
    unreasoned = reason == template_capabilities.NO_REASONING
    if unreasoned and chat.thought is not None and on_answers:
        reason = ""  # the prompt opens the reasoning, which is written behind it
    if isinstance(record, Preference):
        if reason := reason or chat.omissions.of_prompt(record.prompt, record.tools):
            return Refused(reason, named)
        return _Prepared(record, encode.answer_exchanges(record))
    if reason:
        return Refused(reason, named)
    shorter = skip_old_turns(chat, record, options.limits, options.loss_on)
    if isinstance(shorter, Refused):
        return shorter
    record, dropped = shorter
    turns = enumerate(record.turns)
    answers = [place for place, turn in turns if encode.is_answer(turn, options.loss_on)]
    reasoned = bool(capabilities.reasoning) and on_answers
    reason = chat.omissions.of_answers(
        record.turns, answers if on_answers else answers[-1:], record.tools, reasoned=reasoned
    )
    if reason:
        return Refused(reason, named)
    return _Prepared(record, encode.trained_exchanges(record) if on_answers else (), dropped)
