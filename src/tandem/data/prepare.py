"""The way of data from its sources to encoded records, every loss on the way accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, TypeVar

from tandem.data.encode import (
    Chat,
    Encoded,
    Exchange,
    Refused,
    conversation_tree,
    encode_exchanges,
    pair_tree,
)
from tandem.data.formats import (
    Format,
    Kind,
    Question,
    Unusable,
    describe_formats,
    detect,
    read_question,
)
from tandem.data.ledger import Ledger
from tandem.data.records import Conversation, PreferencePair, Tree
from tandem.data.sources import BadLine, Row, SourceSpec, read_rows
from tandem.data.template import ChatTemplate
from tandem.data.truncate import (
    Fitted,
    Limits,
    fit_conversation,
    fit_pair,
    trained_exchanges,
)
from tandem.errors import UserError

OnBadRecord = Literal["stop", "drop"]
Record = TypeVar("Record", Conversation, PreferencePair)

# Rows of no known format that a source may begin with before it is given up.
_UNKNOWN_ROWS = 20
# Records a tokenizer call: enough for its threads, little enough to stay in cache.
_BATCH = 256


def prepare_conversations(
    sources: Sequence[SourceSpec],
    *,
    tokenizer: Any,
    template: ChatTemplate,
    max_length: int,
    max_prompt_length: int | None = None,
    on_bad_record: OnBadRecord = "stop",
    ledger: Ledger,
) -> list[Tree]:
    """Read, encode and fit conversations: one tree a record, in reading order.

    `max_length` and `max_prompt_length` are tokens; a conversation within `max_length` is never
    cut. Raises `UserError` for sources, lines or templates that cannot be used, and when no
    record is left.
    """
    chat = Chat.of(tokenizer, template)
    limits = Limits(max_length, max_prompt_length)

    def fit(record: Conversation, encoded: Sequence[Encoded | Refused]) -> Fitted | Refused:
        return fit_conversation(chat, record, encoded, limits)

    def tree(record: Conversation, encoded: Sequence[Encoded]) -> Tree:
        return conversation_tree(encoded, record.origin)

    records = read_conversations(sources, ledger, on_bad_record)
    trees = list(_prepare(records, chat, trained_exchanges, fit, tree, ledger))
    return _some(trees, sources, ledger)


def prepare_pairs(
    sources: Sequence[SourceSpec],
    *,
    tokenizer: Any,
    template: ChatTemplate,
    max_length: int,
    max_prompt_length: int | None = None,
    on_bad_record: OnBadRecord = "stop",
    ledger: Ledger,
) -> list[Tree]:
    """Read, encode and fit preference pairs: one tree a record, in reading order.

    `max_length` (prompt and one answer) and `max_prompt_length` are tokens. Raises as
    `prepare_conversations` does.
    """
    chat = Chat.of(tokenizer, template)
    limits = Limits(max_length, max_prompt_length)

    def exchanges(pair: PreferencePair) -> list[Exchange]:
        return [Exchange(pair.prompt, text, pair.origin) for text in (pair.chosen, pair.rejected)]

    def fit(record: PreferencePair, encoded: Sequence[Encoded | Refused]) -> Fitted | Refused:
        return fit_pair(chat, record, encoded, limits)

    def tree(record: PreferencePair, encoded: Sequence[Encoded]) -> Tree:
        return pair_tree(encoded[0], encoded[1], record.origin)

    records = read_pairs(sources, ledger, on_bad_record)
    trees = list(_prepare(records, chat, exchanges, fit, tree, ledger))
    return _some(trees, sources, ledger)


def read_conversations(
    sources: Sequence[SourceSpec], ledger: Ledger, on_bad_record: OnBadRecord = "stop"
) -> Iterator[Conversation]:
    """Stream the usable conversations of some sources; the others go to the ledger."""
    for record in _read(sources, "conversations", ledger, on_bad_record):
        assert isinstance(record, Conversation)
        yield record


def read_pairs(
    sources: Sequence[SourceSpec], ledger: Ledger, on_bad_record: OnBadRecord = "stop"
) -> Iterator[PreferencePair]:
    """Stream the usable preference pairs of some sources; the others go to the ledger."""
    for record in _read(sources, "preference pairs", ledger, on_bad_record):
        assert isinstance(record, PreferencePair)
        yield record


def read_questions(sources: Sequence[SourceSpec]) -> list[Question]:
    """All evaluation questions; every bad row is a `UserError`, for a score needs them all."""
    questions = []
    for row in _rows(sources):
        if isinstance(row, BadLine):
            raise _bad_line(row)
        try:
            questions.append(read_question(row.fields, row.origin))
        except Unusable as reason:
            raise UserError(
                f"{row.origin}: no usable question: {reason}. A question is an object with "
                "`question` and `answer` (and `system`, `accepted`, `completion` if wanted)."
            ) from reason
    if not questions:
        raise UserError(f"data: there is no question in {_names(sources)}.")
    return questions


def _prepare(
    records: Iterator[Record],
    chat: Chat,
    exchanges_of: Callable[[Record], list[Exchange]],
    fit: Callable[[Record, Sequence[Encoded | Refused]], Fitted | Refused],
    tree: Callable[[Record, Sequence[Encoded]], Tree],
    ledger: Ledger,
) -> Iterator[Tree]:
    while batch := list(islice(records, _BATCH)):
        exchanges = [exchanges_of(record) for record in batch]
        encoded = iter(encode_exchanges(chat, [one for some in exchanges for one in some]))
        for record, own in zip(batch, exchanges, strict=True):
            fitted = fit(record, list(islice(encoded, len(own))))
            if isinstance(fitted, Refused):
                ledger.dropped(record.origin, fitted.reason, fitted.detail)
                continue
            if fitted.reason:
                ledger.truncated(record.origin, fitted.reason, fitted.detail)
            ledger.trained()
            yield tree(record, fitted.encoded)


def _read(
    sources: Sequence[SourceSpec], kind: Kind, ledger: Ledger, on_bad_record: OnBadRecord
) -> Iterator[Conversation | PreferencePair]:
    for source in sources:
        known: Format | None = None
        waiting: list[Row] = []
        for row in _rows([source]):
            if isinstance(row, BadLine):
                if on_bad_record == "stop":
                    raise _bad_line(row)
                ledger.dropped(row.origin, "unparsable", row.reason)
                continue
            waiting.append(row)
            if known is None:
                known = _detect(row, source, kind, len(waiting))
                if known is None:
                    continue
                ledger.detected(source.path, known.name)
            yield from _usable(waiting, known, ledger)
            waiting.clear()
        if waiting:
            raise _unknown(waiting[0], kind)


def _usable(
    rows: Iterable[Row], known: Format, ledger: Ledger
) -> Iterator[Conversation | PreferencePair]:
    for row in rows:
        try:
            yield known.read(row.fields, row.origin)
        except Unusable as reason:
            ledger.dropped(row.origin, reason.reason, reason.detail)


def _rows(sources: Sequence[SourceSpec]) -> Iterator[Row | BadLine]:
    for source in sources:
        empty = True
        for row in read_rows(source):
            empty = False
            yield row
        if empty:
            raise UserError(f"data: {source.path} is empty.")


def _detect(row: Row, source: SourceSpec, kind: Kind, tried: int) -> Format | None:
    known = detect(row.fields)
    if known is None:
        if tried >= _UNKNOWN_ROWS:
            raise _unknown(row, kind)
        return None
    if known.kind != kind:
        raise UserError(
            f"data: {source.path} holds {known.kind} ({known.name}: "
            f"{', '.join(sorted(known.keys))}), but this stage trains on {kind}. Known formats of "
            f"{kind}: {describe_formats(kind)}."
        )
    return known


def _unknown(row: Row, kind: Kind) -> UserError:
    keys = ", ".join(map(str, row.fields)) or "none"
    return UserError(
        f"{row.origin}: a record of no known format; its keys are: {keys}. Known formats of "
        f"{kind}: {describe_formats(kind)}."
    )


def _bad_line(line: BadLine) -> UserError:
    return UserError(
        f"{line.origin}: the record {line.reason}. Correct or remove it, or leave such records "
        "out with `on_bad_record: drop` (the ledger lists them)."
    )


def _some(trees: list[Tree], sources: Sequence[SourceSpec], ledger: Ledger) -> list[Tree]:
    if not trees:
        reasons = "; ".join(f"{reason}: {n}" for reason, n in ledger.summary()["reasons"].items())
        raise UserError(
            f"data: none of the {ledger.counts['read']} records of {_names(sources)} can be "
            f"trained ({reasons}). {_example(ledger)}"
        )
    return trees


def _example(ledger: Ledger) -> str:
    """What was wrong with the first record that was dropped."""
    entry = next((entry for entry in ledger.entries if entry.outcome == "dropped"), None)
    if entry is None:
        return ""
    why = f"{entry.reason} ({entry.detail})" if entry.detail else entry.reason
    return f"The first, {entry.file}, row {entry.row}: {why}. Correct the data or the limits."


def _names(sources: Sequence[SourceSpec]) -> str:
    return ", ".join(source.path for source in sources)
