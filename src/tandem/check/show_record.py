"""One record as a run would train it: found by its row, encoded, cut into tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tandem.data.encoded.dataset_store import DatasetWriter
from tandem.data.encoded.encode_chunk import EncodingOptions, encode_chunk
from tandem.data.encoded.example import Branch, Example
from tandem.data.formats.format import Kind
from tandem.data.formats.known_formats import format_with
from tandem.data.formats.unpaired import BEFORE, label_of
from tandem.data.ledger import Entry, Ledger
from tandem.data.read_records import formatted_chunks, records_of
from tandem.data.records import Origin, Record
from tandem.data.sources.chunks import BadLine, Row, RowChunk
from tandem.data.sources.rows import origin_names, read_rows
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

TokenUse = Literal["prompt", "trained", "shared", "shared and trained"]
_MOST_BROKEN = 256  # consecutive tokens without a whole character, before they are shown anyway


@dataclass(frozen=True, slots=True)
class Place:
    """A row of a data set, unchanged, and the id of the format in which it is read."""

    row: Row | BadLine
    format: str

    @property
    def format_name(self) -> str:
        """The format's name, empty if no row of its source can be parsed."""
        return format_with(self.format).name if self.format else ""

    @property
    def chunk(self) -> RowChunk:
        """A chunk of only this row."""
        return RowChunk(self.row.origin.file, 1, (self.row,))


@dataclass(frozen=True, slots=True)
class Token:
    """A token: its id, the text it adds, and its use in training."""

    id: int
    text: str
    part: TokenUse


@dataclass(frozen=True, slots=True)
class TokenSection:
    """A whole conversation, or one of several answers, or the prefix that these share."""

    name: str
    tokens: tuple[Token, ...]

    @property
    def trained(self) -> int:
        """How many of its tokens are targets."""
        return sum("trained" in token.part for token in self.tokens)


@dataclass(frozen=True, slots=True)
class Encodings:
    """A row as a run encodes it: sections of each example, and lines of the ledger."""

    kind: Kind
    examples: tuple[tuple[TokenSection, ...], ...]
    entries: tuple[Entry, ...]


def find_row(sources: Sequence[DataSource], kind: Kind, file: str | None, number: int) -> Place:
    """Return row `number` of a file, counted from 1 as in the ledger.

    `file` is a file's name or the end of its path, needed for several files. Raises UserError when
    there is no such file or row, or the sources cannot be read.
    """
    wanted = _file_named(file, origin_names(sources))
    last, joins = 0, False
    for chunk, known in formatted_chunks(sources, kind, Ledger(None), "drop"):
        if chunk.file != wanted:
            continue
        joins = bool(known) and format_with(known).joins
        first = getattr(chunk, "first", None)
        if first is not None:
            last = first + chunk.count - 1
            if number > last:
                continue
        for row in chunk.rows():
            last = max(last, row.origin.row)
            if row.origin.row == number:
                return Place(row, known)
        # Of rows that are joined, those without a partner come last.
        if number <= last and not joins:
            break
    if number > last:
        raise UserError(f"data: {wanted} has no row {number}; its last one is {last}.")
    for source in sources if joins else ():
        for row in read_rows(source):
            if row.origin == Origin(wanted, number) and isinstance(row, Row):
                raise UserError(
                    f"data: row {number} of {wanted} is no pair of its own; its answer is in "
                    f"{_pair_with(row, source, kind)}."
                )
    raise UserError(f"data: row {number} of {wanted} is empty.")


def _pair_with(wanted: Row, source: DataSource, kind: Kind) -> str:
    """Describe the pair, later in the source, that has a row's answer."""
    side = "chosen" if label_of(wanted.fields) else "rejected"
    for chunk, known in formatted_chunks([source], kind, Ledger(None), "drop"):
        apart = format_with(known).to_unpaired
        assert apart is not None
        own = apart(wanted.fields)
        answer = [own.get(key) or None for key in (*BEFORE, "completion")]
        for row in chunk.rows():
            if isinstance(row, BadLine) or side not in row.fields:
                continue
            later = row.origin.file != wanted.origin.file or row.origin.row > wanted.origin.row
            if later and [row.fields.get(key) or None for key in (*BEFORE, side)] == answer:
                return f"that of {row.origin}"
    return "a later one"


def _file_named(file: str | None, names: Sequence[str]) -> str:
    listing = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    if file is None:
        if len(names) > 1:
            raise UserError(f"--row needs --file, because there are {len(names)}: {listing}.")
        return names[0]
    same = [name for name in names if file in (name, Path(name).name) or name.endswith(f"/{file}")]
    if len(same) == 1:
        return same[0]
    what = "none of the files is" if not same else f"{len(same)} files are"
    raise UserError(f"--file {file}: {what} called that; they are {listing}.")


def records_in(place: Place) -> tuple[list[Record], list[Entry]]:
    """Return a row's records, and entries for what a run would drop of it.

    Raises UserError for a row that cannot be parsed, or of which a run would drop all.
    """
    parts = list(records_of(place.chunk, place.format, "stop"))
    records = [one for one in parts if not isinstance(one, Entry)]
    entries = [one for one in parts if isinstance(one, Entry)]
    if not records:
        raise would_be_dropped(entries)
    return records, entries


def outcome(entry: Entry) -> str:
    """Write a ledger's entry as a line."""
    return f"{entry.outcome}: {_why(entry)}"


def would_be_dropped(entries: Sequence[Entry]) -> UserError:
    """Return the error of a row of which a run would drop all."""
    first = entries[0]
    why = "; ".join(dict.fromkeys(map(_why, entries)))
    return UserError(f"{first.file}, row {first.row}: a run would drop this record: {why}")


def _why(entry: Entry) -> str:
    return f"{entry.reason} ({entry.detail})" if entry.detail else entry.reason


def encode_row(chat: ChatTokenizer, options: EncodingOptions, place: Place) -> Encodings:
    """Encode a row as a run does; raise UserError for rows or turns that stop a run."""
    batch = encode_chunk(chat, options, place.chunk, place.format)
    writer = DatasetWriter(None, [batch.file])
    writer.add(batch)
    writer.finish({}, [len(batch.arrays.parts)])
    examples = [_sections(one, options.kind, chat.codec.decode) for one in writer.dataset()]
    if batch.sizes:
        examples = [
            tuple(replace(section, name=f"piece {number} of {len(examples)}") for section in one)
            for number, one in enumerate(examples, start=1)
        ]
    return Encodings(options.kind, tuple(examples), batch.entries)


def _sections(
    example: Example, kind: Kind, decode: Callable[[list[int]], str]
) -> tuple[TokenSection, ...]:
    if kind == "preference pairs" and len(example.branches) == 2:
        names = ["chosen", "rejected"]
    elif len(example.branches) == 1:
        names = ["record"]
    else:
        names = [f"answer {number}" for number in range(1, len(example.branches) + 1)]
    sections = []
    before: list[int] = example.prefix.input_ids.tolist()
    if before:
        texts = token_texts(before, decode)
        sections.append(_section("shared", example.prefix, texts, shared=True))
    for name, branch in zip(names, example.branches, strict=True):
        # Decoded behind the prefix, because a token's text can depend on what is before it.
        texts = token_texts(before + branch.input_ids.tolist(), decode)[len(before) :]
        sections.append(_section(name, branch, texts, shared=False))
    return tuple(sections)


def _section(name: str, branch: Branch, texts: Sequence[str], *, shared: bool) -> TokenSection:
    uses: dict[bool, TokenUse] = {False: "prompt", True: "trained"}
    if shared:
        uses = {False: "shared", True: "shared and trained"}
    tokens = zip(branch.input_ids.tolist(), texts, branch.trained.tolist(), strict=True)
    return TokenSection(
        name, tuple(Token(token, text, uses[trained]) for token, text, trained in tokens)
    )


def token_texts(ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """Return the text that each token adds; the last of several adds their common character."""
    texts: list[str] = []
    # Decoded in a window behind the last whole character, so that blanks are kept.
    start = done = 0
    for end in range(1, len(ids) + 1):
        before = decode(list(ids[start:done]))
        text = decode(list(ids[start:end]))
        whole = not text.endswith("\ufffd") or end - done >= _MOST_BROKEN
        if (whole or end == len(ids)) and text.startswith(before):
            texts.append(text[len(before) :])
            start, done = done, end
        else:
            texts.append("")
    return texts
