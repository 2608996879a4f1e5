"""Records of a data set: the format of each source, and what each row turns out to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Literal

from tandem.data.chunks import BadLine, Chunk, Row
from tandem.data.formats import (
    Format,
    Kind,
    Question,
    Unusable,
    describe_formats,
    detect,
    format_named,
    read_question,
)
from tandem.data.ledger import Entry, Ledger
from tandem.data.records import Conversation, PreferencePair
from tandem.data.sources import SourceSpec, read_chunks, read_rows
from tandem.errors import UserError

OnBadRecord = Literal["stop", "drop"]

# Rows of no known format that a source may begin with before it is given up.
_UNKNOWN_ROWS = 20


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
    questions: list[Question] = []
    for source in sources:
        before = len(questions)
        for row in read_rows(source):
            if isinstance(row, BadLine):
                raise _bad_line(row)
            try:
                questions.append(read_question(row.fields, row.origin))
            except Unusable as reason:
                raise UserError(
                    f"{row.origin}: no usable question: {reason}. A question is an object with "
                    "`question` and `answer` (and `system`, `accepted`, `completion` if wanted)."
                ) from reason
        if len(questions) == before:
            raise UserError(f"data: {source.path} is empty.")
    if not questions:
        raise UserError(f"data: there is no question in {names_of(sources)}.")
    return questions


def _read(
    sources: Sequence[SourceSpec], kind: Kind, ledger: Ledger, on_bad_record: OnBadRecord
) -> Iterator[Conversation | PreferencePair]:
    for chunk, known in formatted_chunks(sources, kind, ledger, on_bad_record):
        for record in records_of(chunk, known, on_bad_record):
            if isinstance(record, Entry):
                ledger.add([record], 0)
            else:
                yield record


def formatted_chunks(
    sources: Sequence[SourceSpec], kind: Kind, ledger: Ledger, on_bad_record: OnBadRecord
) -> Iterator[tuple[Chunk, str]]:
    """The pieces of some sources and the name of each one's format, which the ledger is told.

    A source's first rows tell its format. Raises `UserError` for a source that is empty, of no
    known format or of another kind. The name is empty for a source without a parsable row.
    """
    for source in sources:
        chunks = read_chunks(source)
        seen: list[Chunk] = []
        known = _look(chunks, seen, source, kind, on_bad_record)
        if known is not None:
            ledger.detected(source.path, known.name)
        for chunk in chain(seen, chunks):
            yield chunk, known.name if known else ""


def records_of(
    chunk: Chunk, known: str, on_bad_record: OnBadRecord
) -> Iterator[Conversation | PreferencePair | Entry]:
    """A piece's records in the format named `known`; an entry for each one that is dropped.

    Raises `UserError` for a row that cannot be parsed, unless such rows are dropped.
    """
    read = format_named(known).read if known else None
    for row in chunk.rows():
        if isinstance(row, BadLine):
            if on_bad_record == "stop":
                raise _bad_line(row)
            yield Entry.dropped(row.origin, "unparsable", row.reason)
            continue
        assert read is not None
        try:
            yield read(row.fields, row.origin)
        except Unusable as reason:
            yield Entry.dropped(row.origin, reason.reason, reason.detail)


def names_of(sources: Sequence[SourceSpec]) -> str:
    """The sources' names, for messages."""
    return ", ".join(source.path for source in sources)


def _bad_line(line: BadLine) -> UserError:
    return UserError(
        f"{line.origin}: the record {line.reason}. Correct or remove it, or leave such records "
        "out with `on_bad_record: drop` (the ledger lists them)."
    )


def _look(
    chunks: Iterator[Chunk],
    seen: list[Chunk],
    source: SourceSpec,
    kind: Kind,
    on_bad_record: OnBadRecord,
) -> Format | None:
    """The format by a source's first rows; the pieces they came from are put into `seen`."""
    first: Row | None = None
    tried, empty = 0, True
    for chunk in chunks:
        seen.append(chunk)
        for row in chunk.rows():
            empty = False
            if isinstance(row, BadLine):
                if on_bad_record == "stop":
                    raise _bad_line(row)
                continue
            first, tried = first or row, tried + 1
            if known := _detect(row, source, kind, tried):
                return known
    if empty:
        raise UserError(f"data: {source.path} is empty.")
    if first is not None:
        raise _unknown(first, kind)
    return None


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
