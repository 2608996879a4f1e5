"""The account of every record that was cut or left out: file, row and reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tandem.artifact.files import atomic_write_text
from tandem.data.records import Origin

Outcome = Literal["truncated", "dropped"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger."""

    file: str
    row: int
    outcome: Outcome
    reason: str
    detail: str

    @classmethod
    def dropped(cls, origin: Origin, reason: str, detail: str = "") -> Entry:
        """A record that is not trained at all."""
        return cls(origin.file, origin.row, "dropped", reason, detail)

    @classmethod
    def truncated(cls, origin: Origin, reason: str, detail: str = "") -> Entry:
        """A record that is trained, but not whole."""
        return cls(origin.file, origin.row, "truncated", reason, detail)


class Ledger:
    """Collects what happened to the records of a stage; `write` puts it on disk.

    Every record is counted once as read, and ends up either trained (whole or truncated) or
    dropped, so read = trained + dropped. With `path` None nothing is written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self.formats: dict[str, str] = {}
        self._trained = 0

    def trained(self, count: int = 1) -> None:
        """Count records that are trained, truncated ones included."""
        self._trained += count

    def add(self, entries: Iterable[Entry], trained: int) -> None:
        """Note what became of some records, in reading order, and how many are trained."""
        self.entries.extend(entries)
        self._trained += trained

    def dropped(self, origin: Origin, reason: str, detail: str = "") -> None:
        """Note a record that is not trained at all."""
        self.entries.append(Entry.dropped(origin, reason, detail))

    def detected(self, source: str, format_name: str) -> None:
        """Note the format that a source was found to be in."""
        self.formats[source] = format_name

    @property
    def counts(self) -> dict[str, int]:
        """How many records were read, trained, truncated and dropped."""
        outcomes = Counter(entry.outcome for entry in self.entries)
        return {
            "read": self._trained + outcomes["dropped"],
            "trained": self._trained,
            "truncated": outcomes["truncated"],
            "dropped": outcomes["dropped"],
        }

    def summary(self) -> dict[str, Any]:
        """The counts, the number of records per reason, and the format of every source."""
        reasons = Counter(entry.reason for entry in self.entries)
        return {**self.counts, "reasons": dict(reasons.most_common()), "formats": self.formats}

    def write(self) -> None:
        """Write one JSON object a line to `path`, whole or not at all."""
        if self.path is None:
            return
        lines = [json.dumps(asdict(entry), ensure_ascii=False) + "\n" for entry in self.entries]
        atomic_write_text(self.path, "".join(lines))
