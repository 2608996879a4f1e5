"""Cut one data file of any kind into chunks."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tandem.data.records import Origin
from tandem.data.sources.chunks import (
    BOM,
    BadLine,
    LineChunk,
    Plain,
    Row,
    RowChunk,
    TextChunk,
    cannot_read,
    object_row,
)
from tandem.data.sources.compression import (
    BrokenStream,
    check_signature,
    is_compressed,
    kind_of,
    read_blocks,
)
from tandem.data.sources.tables import cell_rows, table_file_chunks
from tandem.errors import UserError

_LINES = (".jsonl", ".ndjson")
_TEXTS = (*_LINES, ".json", ".csv", ".tsv")
_TABLES = (".parquet", ".arrow")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# A chunk ends after so many rows (enough for a tokenizer call, few enough to stay in cache), or
# after so many bytes of a JSON lines file.
_ROWS, _BLOCK = 256, 2**20

KINDS = ", ".join((*_TEXTS, *_TABLES)) + " (texts also as .gz or .zst)"


def is_data(file: Path) -> bool:
    """Return whether a file is of a kind that can be read, by its name."""
    return kind_of(file) in _TEXTS or file.suffix.lower() in _TABLES


def file_chunks(file: Path) -> Iterator[Plain]:
    """Yield a file's chunks; raise `UserError` for an unknown kind or an unreadable file."""
    try:
        if not is_data(file):
            raise UserError(f"data: {file} is not of a kind that can be read. Use one of {KINDS}.")
        check_signature(file)
        kind = kind_of(file)
        if kind in _TABLES:
            yield from table_file_chunks(file)
        elif kind in _DELIMITERS:
            yield from _row_chunks(cell_rows(file, _DELIMITERS[kind]), str(file))
        elif _is_array(file):
            yield from _row_chunks(array_rows(file), str(file))
        elif _is_one_object(file):
            raise UserError(
                f"data: {file} is a JSON object over several lines. A data set is an array of "
                "objects, or one object a line. If its records are a list under a key, save that "
                "list alone."
            )
        elif is_compressed(file):
            yield from _text_chunks(file)
        else:
            yield from _line_chunks(file)
    except OSError as error:
        raise cannot_read(str(file), error) from error


def count_rows(file: Path) -> int | None:
    """Return the rows of a file, blank lines included, or None when only parsing can tell."""
    if kind_of(file) == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(file).num_rows)
        except (OSError, pyarrow.ArrowException):
            return None
    if is_compressed(file) or kind_of(file) not in (*_LINES, ".json") or _is_array(file):
        return None
    count, last = 0, b"\n"
    with file.open("rb") as lines:
        while block := lines.read(8 * _BLOCK):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def _line_chunks(file: Path) -> Iterator[Plain]:
    first, start = 1, 0
    with file.open("rb") as lines:
        while block := lines.readlines(_BLOCK):
            for at in range(0, len(block), _ROWS):
                part = block[at : at + _ROWS]
                stop = start + sum(map(len, part))
                yield LineChunk(str(file), first, len(part), start, stop)
                first, start = first + len(part), stop


def _text_chunks(file: Path) -> Iterator[Plain]:
    """Yield lines of a compressed file; where it breaks off, one bad line stands for the rest."""
    first, rest = 1, [b""]
    broken = ""
    blocks = read_blocks(file)
    while True:
        try:
            block = next(blocks, b"")
        except BrokenStream as error:
            block, broken = b"", str(error)
        if block and b"\n" not in block:
            rest.append(block)
            continue
        whole, newline, after = b"".join([*rest, block]).rpartition(b"\n")
        rest = [after]
        lines = whole.split(b"\n") if newline else []
        for at in range(0, len(lines), _ROWS):
            part = lines[at : at + _ROWS]
            yield TextChunk(str(file), first, len(part), b"\n".join(part))
            first += len(part)
        if not block:
            break
    if broken:
        reason = f"and what follows cannot be read: {broken}"
        yield RowChunk(str(file), 1, (BadLine(Origin(str(file), first), reason),))
    elif rest[0]:
        yield TextChunk(str(file), first, 1, rest[0])


def _is_array(file: Path) -> bool:
    """Return whether a JSON file is one array, whatever its name says.

    JSON lines may begin with a bad line that is a list; then more lines follow.
    """
    start = _start(file)
    if not start.startswith(b"["):
        return False
    if kind_of(file) == ".json":
        return True
    line, _, after = start.partition(b"\n")
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return not after.strip()


def _is_one_object(file: Path) -> bool:
    """Return whether a JSON file begins with an object over several lines, as editors write it.

    A line of nothing but `{` may also be a broken record among lines; then no key follows.
    """
    first, _, after = _start(file).partition(b"\n")
    return first.strip() == b"{" and after.lstrip().startswith(b'"')


def _start(file: Path) -> bytes:
    """Return a file's first bytes without BOM and space; none if it cannot be decompressed."""
    try:
        return b"".join(islice(read_blocks(file), 1)).removeprefix(BOM).lstrip()
    except BrokenStream:
        return b""


def _row_chunks(rows: Iterator[Row | BadLine], name: str) -> Iterator[Plain]:
    while some := tuple(islice(rows, _ROWS)):
        yield RowChunk(name, len(some), some)


_GAP = re.compile(r"[ \t\n\r]*")
# Longer than any word or escape of JSON: only nearer to a window's end may broken syntax be cut
# off.
_LONGEST_WORD = 16


def array_rows(file: Path) -> Iterator[Row | BadLine]:
    """Yield the elements of the array in a file, one by one.

    Broken syntax is one bad row and the last: without punctuation, the next row cannot be found.
    """
    reader = _Elements(file)
    reader.skip(1)
    row = 1
    while not (row == 1 and reader.at("]")):
        origin = Origin(str(file), row)
        try:
            value = reader.value()
        except (ValueError, RecursionError) as error:
            why = reader.broken or f"is not valid JSON ({error})"
            yield BadLine(origin, f"and what follows {why}")
            return
        yield object_row(value, origin)
        reader.skip(0)
        row += 1
        if reader.at("]"):
            break
        if not reader.at(","):
            why = reader.broken or "the JSON array is cut off"
            yield BadLine(Origin(str(file), row), f"is not reached: {why}")
            return
        reader.skip(1)
    reader.skip(1)
    if reader.broken or not reader.ended:
        why = reader.broken or "it is text behind the end of the JSON array"
        yield BadLine(Origin(str(file), row), f"is not reached: {why}")


class _Elements:
    """A window on a file's text that grows until it holds the next element."""

    def __init__(self, file: Path) -> None:
        self.broken = ""
        self._blocks = read_blocks(file)
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._place = 0
        self._passed = 0
        self._bytes = 0
        self._ended = False
        self.skip(0)

    def at(self, character: str) -> bool:
        """Return whether the text goes on with a character."""
        return self._text.startswith(character, self._place)

    @property
    def ended(self) -> bool:
        """Whether everything was read and passed."""
        return self._ended and self._place == len(self._text)

    def skip(self, count: int) -> None:
        """Pass some characters, and the space after them."""
        self._place += count
        while True:
            match = _GAP.match(self._text, self._place)
            self._place = match.end() if match else self._place
            if self._place < len(self._text) or not self._grow(1):
                return

    def value(self) -> object:
        """Pass and return an element; raise ValueError when there is none."""
        while True:
            try:
                value, place = self._parse(self._text, self._place)
                # At the window's end, a number may continue.
                if place < len(self._text) or self._ended:
                    self._place = place
                    return value
            except json.JSONDecodeError as error:
                cut_off = error.pos + _LONGEST_WORD > len(self._text)
                if self._ended or not (cut_off or error.msg.startswith("Unterminated string")):
                    at = self._passed + error.pos + 1
                    raise ValueError(f"{error.msg}, character {at} of the text") from error
            # Twice as much each time, so that a long element is not parsed over and over.
            self._grow(len(self._text) - self._place)

    def _grow(self, wanted: int) -> bool:
        """Read `wanted` more characters or more, drop the passed ones; return False at the end."""
        parts = [self._text[self._place :]]
        grown = 0
        while grown < wanted and not self._ended:
            try:
                block = next(self._blocks, b"")
                part = self._decode.decode(block, final=not block)
            except BrokenStream as error:
                self.broken, block, part = f"cannot be read: {error}", b"", ""
            except UnicodeDecodeError as error:
                sound = error.object[: error.start]  # begins with what the last block left over
                place = self._bytes + len(block) - len(error.object) + len(sound) + 1
                self.broken = f"is not valid UTF-8 (byte {place})"
                block, part = b"", sound.decode("utf-8-sig")
            self._bytes += len(block)
            self._ended = not block
            grown += len(part)
            parts.append(part)
        self._passed += self._place
        self._text, self._place = "".join(parts), 0
        return grown > 0
