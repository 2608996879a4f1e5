"""The keys of a source's rows that nothing reads, and values that cannot be read where one does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

from tandem.data.chunks import Chunk, Row
from tandem.data.formats import Format
from tandem.data.formats.mapping import led_into
from tandem.data.formats.turns import read_keys
from tandem.data.records import Unreadable
from tandem.data.sources import SourceSpec

# What tells a turn, and what is read of one.
_SPEAKERS = {"role", "from"}
_OF_TURNS = read_keys("assistant") | read_keys("tool")


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


def unreadable(fields: Mapping[str, object], keys: Set[str]) -> str:
    """What cannot be read of a row's columns of these keys, and why; empty when all can be.

    What a turn holds beside what is read of it does not count.
    """
    found = ((key, _lost_in(fields[key], str(key))) for key in fields if key in keys)
    return next((lost for _, lost in found if lost), "")


def unreadable_text(fields: Mapping[str, object]) -> str:
    """The same for the texts in all columns of a row; other values do not count."""
    found = (_lost_in(value, str(key), texts=True) for key, value in fields.items())
    return next((lost for lost in found if lost), "")


def _lost_in(value: object, place: str, *, texts: bool = False) -> str:
    if isinstance(value, Unreadable):
        if texts and not value.text:
            return ""
        return f"holds in `{place}` a value that {value.reason}"
    inner: Iterable[tuple[str, object]] = ()
    if isinstance(value, list):
        inner = ((f"{place}[{number}]", one) for number, one in enumerate(value))
    elif isinstance(value, Mapping):
        read = _OF_TURNS if _SPEAKERS & value.keys() and not texts else value.keys()
        inner = ((f"{place}.{key}", one) for key, one in value.items() if key in read)
    found = (_lost_in(one, where, texts=texts) for where, one in inner)
    return next((lost for lost in found if lost), "")
