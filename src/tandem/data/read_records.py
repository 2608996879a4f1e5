"""Records of a data set: the format of each source, and what each row turns out to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING

from tandem.data.formats import check_fields, known_formats
from tandem.data.formats.advice import OTHER_WAYS, SAYING, advice_on
from tandem.data.formats.check_fields import unreadable
from tandem.data.formats.conversations import QUESTION_KEYS, Question, read_question
from tandem.data.formats.format import Fields, Format, InvalidRecord, Kind
from tandem.data.formats.known_formats import (
    OF_TOKENS,
    describe_formats,
    detect,
    format_called,
    format_with,
)
from tandem.data.formats.turns import check_text_alone, tools_in
from tandem.data.formats.unpaired import joined
from tandem.data.ledger import Entry, Ledger
from tandem.data.records import Conversation, Document, Preference, Record, TokenPair
from tandem.data.sources.chunks import BadLine, Chunk, RenamedChunk, Row, RowChunk
from tandem.data.sources.rows import read_chunks, read_rows
from tandem.errors import UserError
from tandem.recipe.choices import OnBadRecord

if TYPE_CHECKING:
    from tandem.recipe.data_source import DataSource


# Rows of no known format that a source may begin with before it is given up.
_UNKNOWN_ROWS = 20


def read_conversations(
    sources: Sequence[DataSource], ledger: Ledger, on_bad_record: OnBadRecord = "stop"
) -> Iterator[Conversation]:
    """Stream the usable conversations of some sources; the others go to the ledger.

    Raises `UserError` for rows without turns.
    """
    for record in read_records(sources, "conversations", ledger, on_bad_record):
        if isinstance(record, Document):
            raise not_answers(record)
        if not isinstance(record, Conversation):
            raise UserError(
                f"{record.origin}: this record has no turns, only tokens, and conversations are "
                "needed here. Name data with the turns themselves."
            )
        yield record


def read_pairs(
    sources: Sequence[DataSource], ledger: Ledger, on_bad_record: OnBadRecord = "stop"
) -> Iterator[Preference | TokenPair]:
    """Stream the usable preference pairs of some sources; the others go to the ledger."""
    for record in read_records(sources, "preference pairs", ledger, on_bad_record):
        assert isinstance(record, Preference | TokenPair)
        yield record


def read_questions(sources: Sequence[DataSource], limit: int | None = None) -> list[Question]:
    """Return all evaluation questions, or the first `limit`; later rows are not read.

    Raises `UserError` for every bad row, because a score needs them all.
    """
    questions: list[Question] = []
    for source in sources:
        before = len(questions)
        check_fields.check_question_meaning(source)
        for row in read_rows(source):
            if limit is not None and len(questions) >= limit:
                return questions
            row = _asbad_line(row, QUESTION_KEYS)
            if isinstance(row, BadLine):
                raise bad_line(row)
            try:
                questions.append(read_question(row.fields, row.origin))
            except InvalidRecord as reason:
                raise UserError(
                    f"{row.origin}: no usable question: {reason}. A question is an object with "
                    "`question` and `answer` (and `system`, `accepted`, `completion` if wanted)."
                ) from reason
        if len(questions) == before:
            raise UserError(f"data: {source.path} is empty.")
    if not questions:
        raise UserError(f"data: there is no question in {names_of(sources)}.")
    return questions


def not_answers(record: Document) -> UserError:
    """Return the error that answers cannot be trained or asked for in a text alone."""
    return UserError(
        f"{record.origin}: its `text` does not say what is asked and what is answered. For "
        "training on every token of such texts set `loss_on: text` in the recipe's sft, or "
        f"--loss_on text. Known formats of conversations: {describe_formats('conversations')}. If "
        f"only names differ, say so {SAYING}."
    )


def read_records(
    sources: Sequence[DataSource], kind: Kind, ledger: Ledger, on_bad_record: OnBadRecord
) -> Iterator[Record]:
    """Stream the usable records of a kind from some sources; the others go to the ledger."""
    for chunk, known in formatted_chunks(sources, kind, ledger, on_bad_record):
        for record in records_of(chunk, known, on_bad_record):
            if isinstance(record, Entry):
                ledger.add([record], 0)
            else:
                yield record


def formatted_chunks(
    sources: Sequence[DataSource],
    kind: Kind,
    ledger: Ledger,
    on_bad_record: OnBadRecord,
    limit: int | None = None,
) -> Iterator[tuple[Chunk, str]]:
    """Yield the chunks of some sources, each with its format's id; empty without a parsable row.

    A source's first rows decide its format. The ledger gets the format's name and the unread keys.
    A `limit` reads only so many rows of each source. Raises `UserError` for a source that is
    empty, of no known format or of another kind.
    """
    for source in sources:
        chunks = read_chunks(source)
        chunks = chunks if limit is None else _first_rows(chunks, limit)
        seen: list[Chunk] = []
        known = _look(chunks, seen, source, kind, on_bad_record)
        rest: Iterator[Chunk] = chain(seen, chunks)
        if known is not None:
            check_fields.check_meaning(source, known)
            ledger.detected(source.path, known.name, check_fields.unread_keys(seen, known, source))
            rest = joined(rest, known) if known.joins else rest
        for chunk in rest:
            yield chunk, known.id if known else ""


def holds_tokens(source: DataSource, kind: Kind) -> bool:
    """Return whether a source's rows are tokens already; raise `UserError` as reading does."""
    _, known = next(formatted_chunks([source], kind, Ledger(None), "drop"), (None, ""))
    return bool(known) and format_with(known).name in OF_TOKENS


def _first_rows(chunks: Iterator[Chunk], limit: int) -> Iterator[Chunk]:
    """Yield chunks until they have `limit` rows together."""
    for chunk in chunks:
        if chunk.count > limit:
            names = chunk.renaming if isinstance(chunk, RenamedChunk) else None
            plain = chunk.inner if isinstance(chunk, RenamedChunk) else chunk
            rows = tuple(islice(plain.rows(), limit))
            first = RowChunk(chunk.file, len(rows), rows)
            chunk = RenamedChunk(first, names) if names else first
        yield chunk
        limit -= chunk.count
        if limit <= 0:
            return


def records_of(chunk: Chunk, known: str, on_bad_record: OnBadRecord) -> Iterator[Record | Entry]:
    """Yield a chunk's records in the format with the id `known`, and an entry for each dropped one.

    A row may hold several of both. Raises `UserError` for a row that cannot be parsed, unless such
    rows are dropped.
    """
    layout = known_formats.format_with(known) if known else None
    read_keys = layout.read_keys if layout else frozenset()
    others: dict[tuple[str, ...], tuple[Format, ...]] = {}
    for row in chunk.rows():
        row = _asbad_line(row, read_keys)
        if isinstance(row, BadLine):
            if on_bad_record == "stop":
                raise bad_line(row)
            yield Entry.dropped(row.origin, "unparsable", row.reason)
            continue
        assert layout is not None
        keys = tuple(row.fields)
        if keys not in others:
            others[keys] = known_formats.overlooked(keys, layout)
        try:
            _check_format(row.fields, others[keys], layout)
            check_text_alone(row.fields)
            tools = tools_in(row.fields) if layout.chat else ""
            records = layout.read(row.fields, row.origin)
        except InvalidRecord as verdict:
            tools, records = "", [_another_format(row.fields, layout) or verdict]
        for record in records:
            if isinstance(record, InvalidRecord):
                yield Entry.dropped(row.origin, record.reason, record.detail)
            else:
                yield _with_tools(record, tools)


def _with_tools(record: Record, tools: str) -> Record:
    if tools and isinstance(record, Conversation | Preference):
        return replace(record, tools=tools)
    return record


def _asbad_line(row: Row | BadLine, keys: Set[str]) -> Row | BadLine:
    """Return the row, or a `BadLine` when one of its columns under `keys` is unreadable."""
    if isinstance(row, Row) and row.broken and (reason := unreadable(row.fields, keys)):
        return BadLine(row.origin, reason)
    return row


def _check_format(fields: Fields, others: Sequence[Format], known: Format) -> None:
    """Raise `InvalidRecord` for a row that is of one of these other formats by what it holds."""
    for other in others:
        if other.fits(fields) and all(fields[key] is not None for key in other.keys):
            keys = ", ".join(map(str, fields))
            raise _other_format(other, known, f"its keys are {keys}")


def _other_format(other: Format, known: Format, detail: str) -> InvalidRecord:
    names = f"{other.name}, not {known.name}"
    return InvalidRecord(f"a row of another format than its source's first ({names})", detail)


def _another_format(fields: Fields, known: Format) -> InvalidRecord | None:
    """Return the reason for a row that lacks its source's keys but has another format's."""
    present = {key: value for key, value in fields.items() if value is not None}
    # Joined rows are not as they were.
    if known.joins or known.keys <= present.keys():
        return None
    other = detect(present)
    if other is None or other.keys == known.keys:
        return None
    return _other_format(other, known, f"without {', '.join(sorted(known.keys - present.keys()))}")


def names_of(sources: Sequence[DataSource]) -> str:
    """Return the sources' names for messages."""
    return ", ".join(source.path for source in sources)


def bad_line(line: BadLine) -> UserError:
    """Return the error of a record that cannot be parsed."""
    return UserError(
        f"{line.origin}: the record {line.reason}. Correct or remove it, or leave such records "
        "out with `on_bad_record: drop` (the ledger lists them)."
    )


def _look(
    chunks: Iterator[Chunk], seen: list[Chunk], source: DataSource, kind: Kind, on_bad: OnBadRecord
) -> Format | None:
    """Return the format of a source's first rows; append the chunks they came from to `seen`."""
    first: Row | None = None
    tried, empty = 0, True
    for chunk in chunks:
        seen.append(chunk)
        for row in chunk.rows():
            empty = False
            if isinstance(row, BadLine):
                if on_bad == "stop":
                    raise bad_line(row)
                continue
            first, tried = first or row, tried + 1
            if known := _detect(row, source, kind):
                return known
            if tried == _UNKNOWN_ROWS:
                raise _unknown(first, source, kind)
    if empty:
        raise UserError(f"data: {source.path} is empty.")
    if first is not None:
        raise _unknown(first, source, kind)
    return None


def _detect(row: Row, source: DataSource, kind: Kind) -> Format | None:
    """Return the format of a row: the one that the source states, if the row has its keys."""
    if source.format is None:
        known = detect(row.fields)
    else:
        known = format_called(source.format)
        if known.kind == kind and not known.keys <= row.fields.keys():
            return None
    if known is None:
        return None
    known = known_formats.variant(known, kind, source.completions)
    if known.kind != kind:
        what = f"{known.kind} ({known.name}: " if known.chat else f"{known.name} ("
        raise UserError(
            f"data: {source.path} holds {what}{', '.join(sorted(known.keys))}), but this stage "
            f"trains on {kind}.{OTHER_WAYS.get((known.kind, kind), '')} Known formats of {kind}: "
            f"{describe_formats(kind)}."
        )
    return known


def _unknown(row: Row, source: DataSource, kind: Kind) -> UserError:
    check_fields.check_use(source)  # a misspelt name of the data's is the likelier reason
    keys = ", ".join(map(str, row.fields)) or "none"
    if source.format is not None:
        known = format_called(source.format)
        return UserError(
            f"{row.origin}: `format` states {known.name} for {source.path}, which needs "
            f"{', '.join(sorted(known.keys))}; this record's keys are: {keys}. Say what they mean "
            f"{SAYING}, or correct `format`."
        )
    unknown = f"{row.origin}: a record of no known format; its keys are: {keys}."
    if advice := advice_on(row.fields, kind):
        return UserError(f"{unknown} {advice}")
    return UserError(
        f"{unknown} Known formats of {kind}: {describe_formats(kind)}. If only names differ, say "
        f"so {SAYING}."
    )
