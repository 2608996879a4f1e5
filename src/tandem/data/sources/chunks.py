"""Chunks of a data set that any process can read: each knows its file and its first row.

A chunk of a JSON lines file is a place in it, one of a compressed file its lines, one of a Parquet
or Arrow file a compact copy of its rows, and one of anything else the rows themselves.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.data.records import Origin, Unreadable
from tandem.errors import UserError

Fields = Mapping[str, object]
# Keys of a turn that a recipe can rename, and the columns that turns may be in.
TURN_KEYS = frozenset({"role", "content", "weight"})
_ROLE_NAMES = ("role", "from")
# ShareGPT's names of a turn's keys; readers take either.
_SAME = {"role": "from", "content": "value"}
_TURN_COLUMNS = (
    "conversations", "messages", "conversation", "prompt", "completion", "response", "chosen",
    "rejected",
)  # fmt: skip
Names = tuple[tuple[str, str], ...]  # pairs of a format's key and the data's name for it


def led_into(fields: Names) -> frozenset[str]:
    """Return the keys of rows that a recipe's names lead into: `answers` of `answers.good`."""
    return frozenset(name.partition(".")[0] for key, name in fields if key not in TURN_KEYS)


@dataclass(frozen=True, slots=True)
class Renaming:
    """A source's own names.

    `fields` are pairs of a format's key and the data's name for it (`a.b` is `b` within `a`);
    `roles` are pairs of the data's name of a role and the role it means.
    """

    fields: Names = ()
    roles: Names = ()

    def __bool__(self) -> bool:
        return bool(self.fields or self.roles)

    def apply(self, fields: Fields) -> dict[str, object]:
        """Return a row, and its turns, under the format's names."""
        row = _moved(fields, [one for one in self.fields if one[0] not in TURN_KEYS])
        names = [one for one in self.fields if one[0] in TURN_KEYS]
        roles = dict(self.roles)
        if names or roles:
            for column in _TURN_COLUMNS:
                if column in row:
                    row[column] = _renamed(row[column], names, roles)
        return row

    def unused(self, fields: Fields) -> tuple[set[str], set[str]]:
        """Return the data's names of keys, and of roles, that a row does not have."""
        keys = {name for key, name in self.fields if key not in TURN_KEYS}
        missing = {name for name in keys if not reach(fields, name)[0]}
        row = Renaming(tuple(one for one in self.fields if one[0] not in TURN_KEYS)).apply(fields)
        turns = [turn for column in _TURN_COLUMNS for turn in _turns(row.get(column))]
        own = {name for key, name in self.fields if key in TURN_KEYS}
        missing |= {name for name in own if not any(reach(turn, name)[0] for turn in turns)}
        role_names = [name for key, name in self.fields if key == "role"] or _ROLE_NAMES
        values = [reach(turn, name) for turn in turns for name in role_names]
        present = {str(role) for exists, role in values if exists}
        return missing, {role for role, _ in self.roles} - present


def reach(fields: Fields, name: str) -> tuple[bool, object]:
    """Return whether a row has a value under a name, and the value; dots lead into objects."""
    if name in fields:
        return True, fields[name]
    head, dot, rest = name.partition(".")
    inner = fields.get(head)
    if dot and isinstance(inner, Unreadable):
        return True, inner
    return reach(inner, rest) if dot and isinstance(inner, Mapping) else (False, None)


def _moved(fields: Fields, names: Sequence[tuple[str, str]]) -> dict[str, object]:
    """Return fields under the format's names, without their old names.

    A renamed key has only what the recipe says: a row without the data's name lacks the key.
    """
    gone = {one for pair in names for one in pair}
    gone |= {_SAME[key] for key, _ in names if key in _SAME}
    moved = {key: value for key, value in fields.items() if key not in gone}
    for key, name in names:
        exists, value = reach(fields, name)
        if exists:
            moved[key] = value
    return moved


def _turns(value: object) -> list[Fields]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, Mapping)]


def _renamed(value: object, names: Sequence[tuple[str, str]], roles: Mapping[str, str]) -> object:
    if isinstance(value, list):
        return [_renamed(item, names, roles) for item in value]
    if not isinstance(value, Mapping):
        return value
    turn = _moved(value, names)
    for key in _ROLE_NAMES:
        role = turn.get(key)
        if isinstance(role, str) and role in roles:
            turn[key] = roles[role]
    return turn


BOM = b"\xef\xbb\xbf"
LATIN = "if the file is Latin-1 or Windows-1252, save it as UTF-8"


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it stands in its file; `broken` if some of its values are `Unreadable`."""

    fields: dict[str, object]
    origin: Origin
    broken: bool = False


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
        """Parse the lines; blank ones are no rows, but they are counted.

        Raises `UserError` when the file cannot be read.
        """
        try:
            with Path(self.file).open("rb") as file:
                file.seek(self.start)
                content = file.read(self.stop - self.start)
        except OSError as error:
            raise cannot_read(self.file, error) from error
        yield from _parsed(content, self.file, self.first, bom=self.start == 0)


@dataclass(frozen=True, slots=True)
class TextChunk:
    """`count` lines as bytes, of a file that cannot be read from the middle."""

    file: str
    first: int
    count: int
    content: bytes

    def rows(self) -> Iterator[Row | BadLine]:
        """Parse the lines; blank ones are no rows, but they are counted."""
        yield from _parsed(self.content, self.file, self.first, bom=self.first == 1)


@dataclass(frozen=True, slots=True)
class ArrowChunk:
    """`count` rows of a table, as one Arrow record batch.

    `lost` are columns that are not in it because they cannot be read, each with the reason.
    """

    file: str
    first: int
    count: int
    batch: bytes
    lost: tuple[tuple[str, str], ...] = ()

    def rows(self) -> Iterator[Row | BadLine]:
        """Yield the rows as Python values, with `Unreadable` for what cannot be one."""
        import pyarrow

        with pyarrow.ipc.open_stream(self.batch) as stream:
            batch = stream.read_next_batch()
        lost = {name: Unreadable(reason) for name, reason in self.lost}
        names = batch.schema.names
        columns = {
            name: [Unreadable("stands in more than one column of this name")] * self.count
            if names.count(name) > 1
            else values_of(batch.column(number))
            for number, name in enumerate(names)
        }
        for at in range(self.count):
            fields = {name: values[at] for name, values in columns.items()}
            origin = Origin(self.file, self.first + at)
            yield Row({**fields, **lost}, origin, bool(lost) or _is_broken([*fields.values()]))


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Rows that were read already; `count` is how many rows of the file they stand for."""

    file: str
    count: int
    read: tuple[Row | BadLine, ...]

    def rows(self) -> Iterator[Row | BadLine]:
        return iter(self.read)


@dataclass(frozen=True, slots=True)
class RenamedChunk:
    """A chunk whose rows are given under the names of their format."""

    inner: LineChunk | TextChunk | ArrowChunk | RowChunk
    renaming: Renaming

    @property
    def file(self) -> str:
        return self.inner.file

    @property
    def count(self) -> int:
        return self.inner.count

    def rows(self) -> Iterator[Row | BadLine]:
        for row in self.inner.rows():
            if isinstance(row, Row):
                row = Row(self.renaming.apply(row.fields), row.origin, row.broken)
            yield row


Plain = LineChunk | TextChunk | ArrowChunk | RowChunk
Chunk = Plain | RenamedChunk


def parse_line(line: bytes, origin: Origin) -> Row | BadLine:
    """Return the JSON object in a line of UTF-8."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1}, 0x{error.object[error.start]:02x},"
        return BadLine(origin, f"is not valid UTF-8 ({byte} of the line; {LATIN})")
    except json.JSONDecodeError as error:
        return BadLine(origin, f"is not valid JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:
        return BadLine(origin, f"is not valid JSON ({error})")
    return object_row(value, origin)


def object_row(value: object, origin: Origin) -> Row | BadLine:
    """Return a JSON value as a row, if it is an object."""
    if not isinstance(value, dict):
        return BadLine(origin, f"is a JSON {type(value).__name__}, not an object")
    return Row(value, origin)


def _is_broken(value: object) -> bool:
    if isinstance(value, list):
        return any(map(_is_broken, value))
    if isinstance(value, dict):
        return any(map(_is_broken, value.values()))
    return isinstance(value, Unreadable)


def cannot_read(file: str, error: OSError) -> UserError:
    """Return the error of a file that the system does not give."""
    return UserError(f"data: {file} cannot be read: {error}.")


def _parsed(content: bytes, file: str, first: int, *, bom: bool) -> Iterator[Row | BadLine]:
    lines = content.split(b"\n")
    if bom:
        lines[0] = lines[0].removeprefix(BOM)
    for number, line in enumerate(lines, start=first):
        if line.strip():
            yield parse_line(line, Origin(file, number))


def values_of(column: Any) -> list[object]:
    """Return the values of a `pyarrow.Array`; a broken one costs none of the others."""
    try:
        values: list[object] = column.to_pylist()
    except Exception:  # each kind of value has errors of its own
        return [_value(column, number) for number in range(len(column))]
    return values


def _value(column: Any, number: int) -> object:
    try:
        scalar = column[number]
    except Exception as error:
        return _unreadable(error)
    return _of_scalar(scalar)


def _of_scalar(scalar: Any) -> object:
    """Return a value; of one that holds others, as many as can be read."""
    import pyarrow

    try:
        return scalar.as_py()
    except Exception as error:
        kind = scalar.type
        if pyarrow.types.is_struct(kind):
            names = [field.name for field in kind]
            if len(names) == len(set(names)):
                return {name: _of_scalar(scalar[name]) for name in names}
        elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            return values_of(scalar.values)
        return _unreadable(error)


def _unreadable(error: Exception) -> Unreadable:
    if isinstance(error, UnicodeDecodeError):
        return Unreadable(f"is not valid UTF-8 (byte {error.start + 1})", text=True)
    message = str(error).strip().partition("\n")[0].rstrip(".")
    return Unreadable(f"Python cannot hold ({type(error).__name__}: {message})")


def allow_long_cells() -> None:
    """Let tables hold long texts; the csv module's own limit is 128 KiB, for all its readers."""
    csv.field_size_limit(2**28)  # longer is a quote that was never closed rather than a text
