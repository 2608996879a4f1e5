"""Record finished work on disk unit by unit, so that it is never lost and never done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.storage.atomic_files import HALVES, sync, sync_open
from tandem.storage.hashing import CHECKSUM, hash_json

# The beginning of every journal.
_START = b'{"journal": '
# The key of the first line that says that the other lines have checksums.
_CHECKSUMS = "checksums"


class Journal:
    """A file of finished units, one synced JSON line each, after a line that names the work.

    Each line has a checksum of the unit and the work, except in journals of earlier versions. An
    unfinished last line, of a killed process, is cut off when the file is opened again. A journal
    of other work is replaced if it has no units, else refused.

    Args:
        path: the file; made with its folder if need be.
        key: what the units depend on, as a hash.

    `entries` are the units of earlier starts. Raises UserError for a journal of other work, a
    damaged one, and a file that is none.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.entries: list[Any] = []
        self._key = key
        self._sealed = True
        path.parent.mkdir(parents=True, exist_ok=True)
        size = self._read(key) if path.exists() else 0
        self._file = path.open("ab")
        self._file.truncate(size)
        if not size:
            self._append({"journal": key, _CHECKSUMS: True})
            sync(path.parent)

    def add(self, entry: Any) -> None:
        """Append a finished unit; when this returns it is on disk."""
        self._append({"unit": entry, CHECKSUM: self._checksum(entry)} if self._sealed else entry)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, value: Any) -> None:
        self._file.write(json.dumps(value, ensure_ascii=False).encode(errors=HALVES) + b"\n")
        self._file.flush()
        sync_open(self._file.fileno())

    def _read(self, key: str) -> int:
        """Read the entries; return the length of the whole lines, 0 to start a new journal."""
        content = self.path.read_bytes()
        if not content.strip(b"\0"):  # after a power cut, only the length may be right
            return 0
        if content[: len(_START)] != _START[: len(content)]:
            raise UserError(
                f"{self.path}: no file of finished work; it does not begin as one, and is left as "
                "it is. Move it away, or choose another output folder."
            )
        lines = content.split(b"\n")[:-1]
        units: list[Any] = []
        try:
            work = self._begin(lines[0]) if lines else None
        except (ValueError, AttributeError):
            if len(lines) > 1:
                raise UserError(
                    f"{self.path}, line 1: damaged. Restore the file, or remove it to start over."
                ) from None
            work = None
        if work is not None and work != key and len(lines) > 1:
            raise UserError(
                f"{self.path} holds {len(lines) - 1} finished units of other prompts, another "
                "model, dtype or device, or other sampling. Use the same to continue, "
                "choose another output folder, or remove the file to start over."
            )
        if work != key:
            self._sealed = True
            return 0
        for number, line in enumerate(lines[1:], start=2):
            try:
                units.append(self._unit(json.loads(line)))
            except (ValueError, RecursionError):
                if number == len(lines):  # after a power cut, the last block may have anything
                    break
                raise UserError(
                    f"{self.path}, line {number}: damaged. Restore the file, or remove the line: "
                    "its work is done again."
                ) from None
        self.entries = units
        return sum(len(line) + 1 for line in lines[: 1 + len(units)])

    def _begin(self, line: bytes) -> Any:
        """Return which work the units are of; raise ValueError for a line without it."""
        first = json.loads(line)
        self._sealed = _CHECKSUMS in first
        if first.keys() != ({"journal", _CHECKSUMS} if self._sealed else {"journal"}):
            raise ValueError("keys that are none of a journal's")
        return first["journal"]

    def _unit(self, value: Any) -> Any:
        """Return the unit of a line; raise ValueError for one whose checksum does not fit."""
        if isinstance(value, dict) and value.keys() == {"unit", CHECKSUM}:
            if value[CHECKSUM] != self._checksum(value["unit"]):
                raise ValueError("its checksum does not fit")
            return value["unit"]
        if self._sealed:
            raise ValueError("it has no checksum")
        return value

    def _checksum(self, unit: Any) -> str:
        return hash_json([self._key, unit])[:16]


def recorded(
    path: Path,
    key: str,
    work: Callable[[Collection[int]], Iterable[Sequence[tuple[int, Any]]]],
    advance: Callable[[int], None],
    holds: Callable[[int, Any], bool] = lambda _number, _value: True,
) -> dict[int, Any]:
    """Return values by number: those of a journal, and the missing ones, recorded as they come.

    Args:
        path, key: the journal's.
        work: from the numbers that are done, makes the others unit by unit, as plain values.
        advance: called with the number of values of earlier starts, then of each unit.
        holds: whether a number's recorded value is still valid; else it counts as missing.
    """
    values: dict[int, Any] = {}
    with Journal(path, key) as journal:
        for line, entry in enumerate(journal.entries, start=2):
            try:
                values |= {number: value for number, value in entry if holds(number, value)}
            except (TypeError, ValueError, LookupError):
                raise UserError(
                    f"{path}, line {line}: no numbered values. Restore the file, or remove the "
                    "line: its work is done again."
                ) from None
        advance(len(values))
        for unit in work(frozenset(values)):
            if unit:
                journal.add([[number, value] for number, value in unit])
            values.update(unit)
            advance(len(unit))
    return values
