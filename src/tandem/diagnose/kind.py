"""What kind of records a source holds, where nothing but its rows can say."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

from tandem.data.chunks import Row
from tandem.data.formats import Kind, detect, format_called
from tandem.data.sources import SourceSpec, read_rows
from tandem.errors import UserError

# Rows that are looked at, of those that can be parsed; the readers give up no later.
_ROWS = 20


def by_kind(
    sources: Sequence[SourceSpec],
) -> tuple[dict[Kind, list[SourceSpec]], list[SourceSpec]]:
    """The sources of each kind, in order; and those with rows of no known format.

    These, and those without a row that can be read, count as conversations: reading them says what
    is wrong.
    """
    found: dict[Kind, list[SourceSpec]] = {}
    unknown: list[SourceSpec] = []
    for source in sources:
        kind, rows = _look(source)
        found.setdefault(kind or "conversations", []).append(source)
        if kind is None and rows:
            unknown.append(source)
    return found, unknown


def _look(source: SourceSpec) -> tuple[Kind | None, int]:
    """The kind of a source's first rows, and after how many of them it was clear, or given up."""
    if source.format is not None:
        return format_called(source.format).kind, 0
    rows = 0
    with suppress(UserError):
        for row in islice((row for row in read_rows(source) if isinstance(row, Row)), _ROWS):
            rows += 1
            known = detect(row.fields)
            if known is not None:
                return known.kind, rows
    return None, rows
