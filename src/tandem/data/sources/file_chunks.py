"""From one data file to its pieces, whatever kind of file it is."""

from __future__ import annotations

import json
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
)
from tandem.data.sources.compression import (
    BrokenStream,
    check_signature,
    is_compressed,
    kind_of,
    read_blocks,
)
from tandem.data.sources.json_array import array_rows
from tandem.data.sources.tables import cell_rows, table_file_chunks
from tandem.errors import UserError

_LINES = (".jsonl", ".ndjson")
_TEXTS = (*_LINES, ".json", ".csv", ".tsv")
_TABLES = (".parquet", ".arrow")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Rows of a piece: enough for a tokenizer call, little enough to stay in cache.
_ROWS = 256
# Bytes that are read at once from a JSON lines file; a piece ends where one of both is reached.
_BLOCK = 2**20

KINDS = ", ".join((*_TEXTS, *_TABLES)) + " (texts also as .gz or .zst)"


def is_data(file: Path) -> bool:
    """Whether a file is of a kind that can be read, by its name."""
    return kind_of(file) in _TEXTS or file.suffix.lower() in _TABLES


def file_chunks(file: Path) -> Iterator[Plain]:
    """The pieces of one data file, in order.

    Raises `UserError` for a file of no known kind, or one that cannot be read.
    """
    try:
        if not is_data(file):
            raise UserError(
                f"data: {file} is no kind of file that can be read here. Use one of {KINDS}."
            )
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
    """How many rows a file has, its blank lines included, or None when only reading can tell."""
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
    first, start, size = 1, 0, _ROWS
    with file.open("rb") as lines:
        while block := lines.readlines(_BLOCK):
            for at in range(0, len(block), size):
                part = block[at : at + size]
                stop = start + sum(map(len, part))
                yield LineChunk(str(file), first, len(part), start, stop)
                first, start = first + len(part), stop


def _text_chunks(file: Path) -> Iterator[Plain]:
    """Lines of a compressed file; where it breaks off, one bad line stands for what follows."""
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
        for part in _parts(whole.split(b"\n") if newline else []):
            yield TextChunk(str(file), first, len(part), b"\n".join(part))
            first += len(part)
        if not block:
            break
    if broken:
        origin = Origin(str(file), first)
        bad = BadLine(origin, f"and what follows cannot be read: {broken}")
        yield RowChunk(str(file), 1, (bad,))
    elif rest[0]:
        yield TextChunk(str(file), first, 1, rest[0])


def _parts(lines: list[bytes]) -> Iterator[list[bytes]]:
    for at in range(0, len(lines), _ROWS):
        yield lines[at : at + _ROWS]


def _is_array(file: Path) -> bool:
    """Whether a JSON file is one array, whatever its name says.

    JSON lines may begin with a line that is a list, which is a bad line; then more lines follow.
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
    """Whether a JSON file begins with an object that goes on over more lines, as editors write it.

    A line of nothing but `{` may also be a broken record among lines; then no key follows.
    """
    first, _, after = _start(file).partition(b"\n")
    return first.strip() == b"{" and after.lstrip().startswith(b'"')


def _start(file: Path) -> bytes:
    """The first bytes of a file, without mark and space; none if it cannot be decompressed."""
    try:
        return b"".join(islice(read_blocks(file), 1)).removeprefix(BOM).lstrip()
    except BrokenStream:
        return b""


def _row_chunks(rows: Iterator[Row | BadLine], name: str) -> Iterator[Plain]:
    while some := tuple(islice(rows, _ROWS)):
        yield RowChunk(name, len(some), some)
