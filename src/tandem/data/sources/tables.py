"""Read tables: CSV and TSV with a header, Parquet, Arrow, and data sets of `datasets`."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

from tandem.data.records import Origin
from tandem.data.sources.chunks import BOM, LATIN, ArrowChunk, BadLine, Row, allow_long_cells
from tandem.data.sources.compression import BrokenStream, read_blocks
from tandem.errors import UserError

# The first line of a table as Excel writes it.
_STATED = re.compile(r'"?sep=(.)"?\r?\n?', re.IGNORECASE)
_DELIMITERS = (",", ";", "\t", "|")
_ESCAPED = re.compile("[\udc80-\udcff]")


def cell_rows(file: Path, delimiter: str) -> Iterator[Row | BadLine]:
    """Yield the rows under the header, counted from 1; every cell is a text, even an empty one.

    Raises `UserError` for a header that does not name each column once.
    """
    allow_long_cells()
    numbers = count(1)
    lines = _lines(file)
    try:
        first = next(lines, "")
    except BrokenStream as error:
        yield _cut_off(file, next(numbers), error)
        return
    if stated := _STATED.fullmatch(first):
        delimiter = stated[1]
    else:
        # The usual delimiter, unless the header lacks it and has another.
        delimiter = next((one for one in (delimiter, *_DELIMITERS) if one in first), delimiter)
        lines = chain([first], lines)
    above = 1 if stated else 0
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        begins = reader.line_num + 1 + above
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if columns is None:
                message = f"data: {file} has no CSV header that can be read ({error})."
                raise UserError(message) from error
            where = f"lines {begins} to {reader.line_num + above} of the file"
            bad = f"is not valid CSV ({error}; {where})"
            yield BadLine(Origin(str(file), next(numbers)), bad)
            continue
        except BrokenStream as error:
            yield _cut_off(file, next(numbers), error)
            return
        if cells is None:
            return
        if not cells:  # an empty line
            continue
        if columns is None:
            columns = _checked_header(cells, file)
            continue
        yield _row(cells, columns, Origin(str(file), next(numbers)))


def _cut_off(file: Path, row: int, error: BrokenStream) -> BadLine:
    return BadLine(Origin(str(file), row), f"and what follows cannot be read: {error}")


def _row(cells: list[str], columns: list[str], origin: Origin) -> Row | BadLine:
    for number, cell in enumerate(cells):
        if invalid := _ESCAPED.search(cell):
            name = columns[number] if number < len(columns) else f"column {number + 1}"
            byte = f"0x{ord(invalid[0]) - 0xDC00:02x}"
            return BadLine(origin, f"is not valid UTF-8 (byte {byte} in `{name}`; {LATIN})")
    if len(cells) != len(columns):
        return BadLine(origin, f"has {len(cells)} cells, while the header has {len(columns)}")
    return Row(dict[str, Any](zip(columns, cells, strict=True)), origin)


def _checked_header(cells: list[str], file: Path) -> list[str]:
    if any(_ESCAPED.search(cell) for cell in cells):
        raise UserError(f"data: the header of {file} is not valid UTF-8. Save it as UTF-8.")
    # As spreadsheets leave them behind the last column, and pandas writes above its index.
    cells = [cell if cell.strip() else f"column {n}" for n, cell in enumerate(cells, start=1)]
    twice = sorted({cell for cell in cells if cells.count(cell) > 1})
    if twice:
        raise UserError(
            f"data: the header of {file} has {', '.join(map(repr, twice))} more than once. Give "
            "each column a name of its own; the first line of the file is the header."
        )
    return cells


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines with their ends; bytes that are no UTF-8 become lone surrogates."""
    rest = [b""]
    first = True
    for block in read_blocks(file):
        if first:
            block, first = block.removeprefix(BOM), False
        if b"\n" not in block:
            rest.append(block)
            continue
        *whole, after = b"".join([*rest, block]).split(b"\n")
        for line in whole:
            yield (line + b"\n").decode("utf-8", "surrogateescape")
        rest = [after]
    if last := b"".join(rest):
        yield last.decode("utf-8", "surrogateescape")


_ROWS = 256  # of a chunk: enough for a tokenizer call, few enough to stay in cache
_BUFFER = 2**20  # without it, a row group of Parquet, often the whole file, is in memory


def table_file_chunks(file: Path) -> Iterator[ArrowChunk]:
    """Yield the chunks of a Parquet or Arrow file; raise `UserError` for a damaged one."""
    import pyarrow

    what = "Parquet" if file.suffix.lower() == ".parquet" else "Arrow"
    row = 0
    try:
        for chunk in _parquet(file) if what == "Parquet" else _arrow(file):
            yield chunk
            row += chunk.count
    except pyarrow.ArrowException as error:
        reason = str(error).strip().rstrip(".")
        fault = f"a damaged {what} file (after row {row}: {reason})."
        if "encrypt" in reason.lower():
            fault = f"an encrypted {what} file ({reason}). Write it without encryption."
        raise UserError(f"data: {file} is {fault}") from error


def dataset_chunks(table: Any, name: str) -> Iterator[ArrowChunk]:
    """Yield the chunks of a data set of `datasets` as stored: no picture or sound is decoded."""
    row = 0
    for part in table.with_format("arrow").iter(batch_size=_ROWS):
        for chunk in _pieces(part.combine_chunks().to_batches(), name, row):
            yield chunk
            row += chunk.count


def _pieces(
    batches: Any, name: str, row: int = 0, lost: tuple[tuple[str, str], ...] = ()
) -> Iterator[ArrowChunk]:
    for batch in batches:
        for at in range(0, batch.num_rows, _ROWS):
            part = batch.slice(at, _ROWS)
            yield ArrowChunk(name, row + 1, part.num_rows, _serialised(part), lost)
            row += part.num_rows


def _parquet(file: Path) -> Iterator[ArrowChunk]:
    """Yield the chunks of a Parquet file; damage in some columns costs only these."""
    import pyarrow
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as table:
        row = 0
        try:
            for chunk in _pieces(table.iter_batches(batch_size=_ROWS), str(file)):
                yield chunk
                row += chunk.count
            return
        except (pyarrow.ArrowException, OSError) as error:
            names = table.schema_arrow.names
            lost = _damaged(table, names)
            sound = [name for name in names if name not in dict(lost)]
            if not lost or not sound:
                raise pyarrow.ArrowInvalid(str(error)) from error
        for chunk in _pieces(
            table.iter_batches(batch_size=_ROWS, columns=sound), str(file), lost=lost
        ):
            if chunk.first > row:
                yield chunk


def _damaged(table: Any, names: list[str]) -> tuple[tuple[str, str], ...]:
    """Return the columns of a Parquet file that cannot be read to the end, with the reasons."""
    import pyarrow

    lost = []
    for name in names:
        try:
            for _ in table.iter_batches(batch_size=_ROWS, columns=[name]):
                pass
        except (pyarrow.ArrowException, OSError) as error:
            lost.append((name, f"cannot be read: {str(error).strip().partition(chr(10))[0]}"))
    return tuple(lost)


def _arrow(file: Path) -> Iterator[ArrowChunk]:
    """Yield the chunks of an Arrow file, which begins with its name, or of an Arrow stream."""
    import pyarrow

    with file.open("rb") as start:
        whole = start.read(6) == b"ARROW1"
    with pyarrow.memory_map(str(file)) as source:
        if whole:
            table = pyarrow.ipc.open_file(source)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            batches = pyarrow.ipc.open_stream(source)
        yield from _pieces(batches, str(file))


def _serialised(batch: Any) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return bytes(sink.getvalue())
