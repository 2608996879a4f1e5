"""What kind of records a source holds, where nothing but its rows can say."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

from tandem.data.chunks import BadLine
from tandem.data.formats import Kind, detect
from tandem.data.sources import SourceSpec, read_rows
from tandem.errors import UserError

# Rows that are looked at; the readers give up no later.
_ROWS = 20


def by_kind(sources: Sequence[SourceSpec]) -> dict[Kind, list[SourceSpec]]:
    """The sources of each kind, in order.

    Those of no known format, and those that are missing, count as conversations: reading them says
    what is wrong.
    """
    found: dict[Kind, list[SourceSpec]] = {}
    for source in sources:
        found.setdefault(_kind_of(source), []).append(source)
    return found


def _kind_of(source: SourceSpec) -> Kind:
    with suppress(UserError):
        for row in islice(read_rows(source), _ROWS):
            known = None if isinstance(row, BadLine) else detect(row.fields)
            if known is not None:
                return known.kind
    return "conversations"
