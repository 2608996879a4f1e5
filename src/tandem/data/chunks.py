"""A data set in pieces that another process can read: each knows its file and its first row.

A piece of a JSON lines file is a place in it, one of a Parquet file a compact copy of its rows, and
one of anything else the rows themselves. `rows` gives the same wherever it is called.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tandem.data.records import Origin
from tandem.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
# Rows of a piece: enough for a tokenizer call, little enough to stay in cache.
_ROWS = 256
# Bytes that are read at once from a JSON lines file; a piece ends where one of both is reached.
_BLOCK = 2**20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it stands in its file."""

    fields: dict[str, object]
    origin: Origin


@dataclass(frozen=True, slots=True)
class BadLine:
    """A record that could not be parsed, and why."""

    origin: Origin
    reason: str


@dataclass(frozen=True, slots=True)
class LineChunk:
    """`count` lines of a file, from byte `start` to `stop`; the first is line `first`."""

    file: str
    first: int
    count: int
    start: int
    stop: int

    def rows(self) -> Iterator[Row | BadLine]:
        """Parse the lines; blank ones are no rows, but counted.

        Raises `UserError` when the file cannot be read.
        """
        try:
            with Path(self.file).open("rb") as file:
                file.seek(self.start)
                lines = file.read(self.stop - self.start).split(b"\n")
        except OSError as error:
            raise cannot_read(self.file, error) from error
        if self.start == 0:
            lines[0] = lines[0].removeprefix(_BOM)
        for number, line in enumerate(lines, start=self.first):
            if line.strip():
                yield _parse(line, Origin(self.file, number))


@dataclass(frozen=True, slots=True)
class ArrowChunk:
    """`count` rows of a table, as one Arrow record batch."""

    file: str
    first: int
    count: int
    batch: bytes

    def rows(self) -> Iterator[Row | BadLine]:
        """The rows as Python values."""
        import pyarrow

        with pyarrow.ipc.open_stream(self.batch) as stream:
            values = stream.read_next_batch().to_pylist()
        for number, value in enumerate(values, start=self.first):
            yield Row(value, Origin(self.file, number))


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Rows that were read already."""

    file: str
    count: int
    read: tuple[Row | BadLine, ...]

    def rows(self) -> Iterator[Row | BadLine]:
        """The rows."""
        return iter(self.read)


Chunk = LineChunk | ArrowChunk | RowChunk


def file_chunks(file: Path) -> Iterator[Chunk]:
    """The pieces of one data file, in order.

    Raises `UserError` for a file of no known kind, or one that cannot be read.
    """
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_chunks(file)
        elif suffix in (".jsonl", ".ndjson"):
            yield from _line_chunks(file)
        elif suffix == ".json":
            yield from _json_chunks(file)
        else:
            raise UserError(
                f"data: {file} is no kind of file that can be read here. Use one of "
                f"{', '.join(SUFFIXES)}."
            )
    except OSError as error:
        raise cannot_read(str(file), error) from error


def table_chunks(table: Iterable[Any], name: str) -> Iterator[Chunk]:
    """The pieces of a table of `datasets`."""
    rows = (Row(dict(fields), Origin(name, row)) for row, fields in enumerate(table, start=1))
    return _row_chunks(rows, name)


def count_rows(file: Path) -> int | None:
    """How many rows a file has, its blank lines included, or None when only reading can tell."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(file).num_rows)
        except (OSError, pyarrow.ArrowException):
            return None
    if suffix == ".json" and _is_array(file):
        return None
    count, last = 0, b"\n"
    with file.open("rb") as lines:
        while block := lines.read(8 * _BLOCK):
            count += block.count(b"\n")
            last = block[-1:]
    return count + (last != b"\n")


def cannot_read(file: str, error: OSError) -> UserError:
    """What to say about a file that the system does not give."""
    return UserError(f"data: {file} cannot be read: {error}.")


def _line_chunks(file: Path) -> Iterator[Chunk]:
    first, start, size = 1, 0, _ROWS
    with file.open("rb") as lines:
        while block := lines.readlines(_BLOCK):
            for at in range(0, len(block), size):
                part = block[at : at + size]
                stop = start + sum(map(len, part))
                yield LineChunk(str(file), first, len(part), start, stop)
                first, start = first + len(part), stop


def _parse(line: bytes, origin: Origin) -> Row | BadLine:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadLine(origin, f"is not valid UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return BadLine(origin, f"is not valid JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:
        return BadLine(origin, f"is not valid JSON ({error})")
    return _row(value, origin)


def _row(value: object, origin: Origin) -> Row | BadLine:
    if not isinstance(value, dict):
        return BadLine(origin, f"is a JSON {type(value).__name__}, not an object")
    return Row(value, origin)


def _is_array(file: Path) -> bool:
    with file.open("rb") as start:
        return start.read(4096).removeprefix(_BOM).lstrip().startswith(b"[")


def _json_chunks(file: Path) -> Iterator[Chunk]:
    """A .json file: an array of objects, or, as is common, JSON lines under that name."""
    if not _is_array(file):
        yield from _line_chunks(file)
        return
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = BadLine(Origin(str(file), 1), f"is not valid UTF-8 (byte {error.start + 1})")
        yield RowChunk(str(file), 1, (bad,))
        return
    yield from _row_chunks(_parse_array(text, str(file)), str(file))


def _row_chunks(rows: Iterator[Row | BadLine], name: str) -> Iterator[Chunk]:
    while some := tuple(islice(rows, _ROWS)):
        yield RowChunk(name, len(some), some)


def _parse_array(text: str, file: str) -> Iterator[Row | BadLine]:
    """The elements of a JSON array one by one; broken syntax ends it, for the rest is unknowable.

    A broken array is one bad line: without its punctuation nobody can say where rows begin.
    """
    decoder = json.JSONDecoder()
    gap = re.compile(r"\s*")

    def skip(position: int) -> int:
        match = gap.match(text, position)
        return match.end() if match else position

    position, row = skip(skip(0) + 1), 0
    if text.startswith("]", position):
        return
    while True:
        row += 1
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield BadLine(Origin(file, row), f"and what follows is not valid JSON ({error})")
            return
        yield _row(value, Origin(file, row))
        position = skip(position)
        if text.startswith("]", position):
            return
        if not text.startswith(",", position):
            yield BadLine(Origin(file, row + 1), "is not reached: the JSON array is cut off")
            return
        position = skip(position + 1)


def _parquet_chunks(file: Path) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        # Read through a small buffer: otherwise a row group, often the whole file, is in memory.
        with pyarrow.parquet.ParquetFile(file, buffer_size=_BLOCK, pre_buffer=False) as table:
            for batch in table.iter_batches(batch_size=_ROWS):
                yield ArrowChunk(str(file), row + 1, batch.num_rows, _serialised(batch))
                row += batch.num_rows
    except pyarrow.ArrowException as error:
        raise UserError(f"data: {file} is no sound Parquet file (after row {row}: {error}).") from (
            error
        )


def _serialised(batch: Any) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return bytes(sink.getvalue())
