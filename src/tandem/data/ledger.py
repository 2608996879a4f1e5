"""The account of every record that was cut or left out: file, row and reason."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tandem.data.records import Origin
from tandem.errors import UserError
from tandem.storage.atomic_files import atomic_write_parts

_SHOWN = 3  # rows that an error names of each reason

Outcome = Literal["truncated", "split", "dropped"]


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

    @classmethod
    def split(cls, origin: Origin, reason: str, detail: str = "") -> Entry:
        """A record that is trained whole, in several examples."""
        return cls(origin.file, origin.row, "split", reason, detail)


class Ledger:
    """Collects what happened to the records of a stage; `write` puts it on disk, if at a `path`.

    Every record that is read ends up either trained (whole, split or truncated), held out or
    dropped, so read = trained + held out + dropped.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self.formats: dict[str, str] = {}
        self.unread: dict[str, tuple[str, ...]] = {}
        self._trained = 0
        self._held_out = 0

    def trained(self, count: int = 1) -> None:
        """Count records that are trained, truncated ones included."""
        self._trained += count

    def hold_out(self, count: int) -> None:
        """Count `count` of the trained records as held out instead."""
        self._trained -= count
        self._held_out += count

    def add(self, entries: Iterable[Entry], trained: int) -> None:
        """Note what became of some records, in reading order, and how many are trained."""
        self.entries.extend(entries)
        self._trained += trained

    def dropped(self, origin: Origin, reason: str, detail: str = "") -> None:
        """Note a record that is not trained at all."""
        self.entries.append(Entry.dropped(origin, reason, detail))

    def detected(self, source: str, format_name: str, unread: Iterable[str] = ()) -> None:
        """Note a source's format, and which keys of its first row of that format are not read."""
        self.formats[source] = format_name
        if keys := {*self.unread.get(source, ()), *unread}:
            self.unread[source] = tuple(sorted(keys))

    @property
    def counts(self) -> dict[str, int]:
        """How many records were read, trained, truncated and dropped.

        Also how many were held out and split, if any were.
        """
        outcomes = Counter(entry.outcome for entry in self.entries)
        return {
            "read": self._trained + self._held_out + outcomes["dropped"],
            "trained": self._trained,
            **({"held_out": self._held_out} if self._held_out else {}),
            **({"split": outcomes["split"]} if outcomes["split"] else {}),
            "truncated": outcomes["truncated"],
            "dropped": outcomes["dropped"],
        }

    def summary(self) -> dict[str, Any]:
        """Return the counts, the records per reason, and each source's format and unread keys."""
        return {
            **self.counts,
            "reasons": dict(Counter(entry.reason for entry in self.entries).most_common()),
            "formats": self.formats,
            "unread_keys": self.unread,
        }

    def check_share(self, most: float) -> None:
        """Raise UserError when more than a share of all records that were read was dropped."""
        counts = self.counts
        if counts["dropped"] <= most * counts["read"]:
            return
        dropped = [entry for entry in self.entries if entry.outcome == "dropped"]
        by_reason: defaultdict[str, list[Entry]] = defaultdict(list)
        for entry in dropped:
            by_reason[entry.reason].append(entry)
        listing = "\n".join(
            f"  {len(some)} x {reason} ({'; '.join(map(_row, some[:_SHOWN]))}"
            + ("; ...)" if len(some) > _SHOWN else ")")
            for reason, some in sorted(by_reason.items(), key=lambda item: -len(item[1]))
        )
        rendering = any(reason.startswith("the chat template") for reason in by_reason)
        template = ", choose another `chat_template`" if rendering else ""
        raise UserError(
            f"{counts['dropped']} of {counts['read']} records would be dropped, "
            f"{counts['dropped'] / counts['read']:.1%}; max_dropped allows {most:.1%}:\n{listing}\n"
            f"Mend the data{template}, or set max_dropped to what you can do without."
        )

    def write(self) -> None:
        """Write one JSON object a line to `path`, whole or not at all."""
        if self.path is not None:
            atomic_write_parts(self.path, map(_line, self.entries))


def _row(entry: Entry) -> str:
    return f"{Path(entry.file).name}, row {entry.row}"


def _line(entry: Entry) -> str:
    fields = {name: getattr(entry, name) for name in Entry.__slots__}
    return json.dumps(fields, ensure_ascii=False) + "\n"
