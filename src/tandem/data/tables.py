"""Rows of Parquet and Arrow files and of data sets of `datasets`, whatever their columns hold.

`Unreadable` stands in the place of a value that Python cannot hold or that needs a decoder. It
matters only where the value is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem.data.chunks import ArrowChunk
from tandem.errors import UserError

# Rows of a piece: enough for a tokenizer call, little enough to stay in cache.
_ROWS = 256
# Otherwise a row group of Parquet, often the whole file, is in memory.
_BUFFER = 2**20


def table_file_chunks(file: Path) -> Iterator[ArrowChunk]:
    """The pieces of a Parquet or Arrow file.

    Raises `UserError` for one that is not sound.
    """
    import pyarrow

    what = "Parquet" if file.suffix.lower() == ".parquet" else "Arrow"
    row = 0
    try:
        for chunk in _parquet(file) if what == "Parquet" else _arrow(file):
            yield chunk
            row += chunk.count
    except pyarrow.ArrowException as error:
        said = str(error).strip().rstrip(".")
        if "encrypt" in said.lower():
            raise UserError(
                f"data: {file} is an encrypted {what} file ({said}). Write it without encryption."
            ) from error
        raise UserError(f"data: {file} is no sound {what} file (after row {row}: {said}).") from (
            error
        )


def dataset_chunks(table: Any, name: str) -> Iterator[ArrowChunk]:
    """The pieces of a data set of `datasets`, as it is stored: no picture or sound is decoded."""
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
    """The pieces of a Parquet file; damage in some columns costs these alone."""
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
    """The columns of a Parquet file that cannot be read to the end, each with the reason."""
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
    """The pieces of an Arrow file, which begins with its name, or of an Arrow stream."""
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
