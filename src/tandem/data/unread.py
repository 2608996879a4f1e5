"""The keys of a source's rows that nothing reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tandem.data.chunks import Chunk, Row
from tandem.data.formats import Format
from tandem.data.formats.mapping import led_into
from tandem.data.sources import SourceSpec


def unread_keys(chunks: Iterable[Chunk], known: Format, source: SourceSpec) -> tuple[str, ...]:
    """The keys that are not read of the first row of the source's format, in order.

    Later rows may have others: `tandem check` looks at them all. A key that the source's names lead
    into (`answers.good`) is read.

    Args:
        chunks: the source's first pieces, not joined yet.
        known: its format.
        source: what is said of it.
    """
    rows = (row.fields for chunk in chunks for row in chunk.rows() if isinstance(row, Row))
    stated = source.format is not None
    first = next(
        (row for row in rows if known.fits(row) or (stated and known.keys <= row.keys())), {}
    )
    # Here rows are as they were, also those that are to be joined.
    return tuple(
        sorted(map(str, replace(known, joins=False).unread(first) - led_into(source.fields)))
    )
