"""Tables of texts: CSV, and TSV, with a header that names the columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

from tandem.artifact.tables import allow_long_cells
from tandem.data.chunks import BOM, LATIN, BadLine, Row
from tandem.data.compressed import BrokenStream, read_blocks
from tandem.data.records import Origin
from tandem.errors import UserError

# The first line of a table as Excel writes it.
_STATED = re.compile(r'"?sep=(.)"?\r?\n?', re.IGNORECASE)
_DELIMITERS = (",", ";", "\t", "|")
_ESCAPED = re.compile("[\udc80-\udcff]")


def cell_rows(file: Path, delimiter: str) -> Iterator[Row | BadLine]:
    """The rows under the header, counted from 1; every cell is a text, an empty one too.

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
        delimiter, lines = _delimiter(first, delimiter), chain([first], lines)
    above = 1 if stated else 0
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        begins = reader.line_num + 1 + above
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if columns is None:
                said = f"data: {file} has no CSV header that can be read ({error})."
                raise UserError(said) from error
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


def _delimiter(header: str, usual: str) -> str:
    """What divides a header: the usual, unless it is not there and another is."""
    return next((one for one in (usual, *_DELIMITERS) if one in header), usual)


def _cut_off(file: Path, row: int, error: BrokenStream) -> BadLine:
    return BadLine(Origin(str(file), row), f"and what follows cannot be read: {error}")


def _row(cells: list[str], columns: list[str], origin: Origin) -> Row | BadLine:
    for number, cell in enumerate(cells):
        if found := _ESCAPED.search(cell):
            name = columns[number] if number < len(columns) else f"column {number + 1}"
            byte = f"0x{ord(found[0]) - 0xDC00:02x}"
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
    """The lines with their ends; bytes that are no UTF-8 become what no UTF-8 can spell."""
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
