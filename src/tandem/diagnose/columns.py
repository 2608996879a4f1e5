"""The signs in a row's other columns: what is not read, and which answer they prefer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from tandem.data.chunks import BadLine, Row
from tandem.data.formats import Format, Kind, format_with
from tandem.data.records import Conversation, PreferencePair
from tandem.data.sources import SourceSpec
from tandem.diagnose.findings import Sign
from tandem.diagnose.sides import Sides, column_signs, sides_of
from tandem.diagnose.unread import Unread

# The signs beside a record, each with what its row says.
Beside = Callable[[Conversation | PreferencePair], Iterator[tuple[Sign, str]]]
Names = tuple[tuple[str, str], ...]


class Columns:
    """Looks at the columns of a pass, piece by piece.

    Args:
        kind: what the rows become.
        sources: where they come from.
    """

    def __init__(self, kind: Kind, sources: Sequence[SourceSpec]) -> None:
        # What a recipe's names lead into is read: `answers` of `answers.good`.
        led = {name.partition(".")[0] for one in sources for _, name in one.fields}
        self._unread = Unread(kind, led)

    @property
    def unread(self) -> tuple[str, ...]:
        """The keys that no row's and no turn's reader took, in order."""
        return self._unread.keys

    def beside(self, rows: Sequence[Row | BadLine], known: str, names: Names) -> Beside:
        """Note a piece's keys; what is returned tells the signs beside each of its records.

        Args:
            rows: the piece's.
            known: the id of their format; empty for rows of none.
            names: a recipe's, key of the format and the data's own.
        """
        fields = {row.origin.row: row.fields for row in rows if isinstance(row, Row)}
        if not known:
            return _none_of
        layout, sides = format_with(known), sides_of(names)
        for row in fields.values():
            self._unread.note(row, layout)
        return lambda record: self._signs(fields[record.origin.row], layout, sides, record)

    def _signs(
        self,
        fields: Mapping[str, object],
        layout: Format,
        sides: Sides,
        record: Conversation | PreferencePair,
    ) -> Iterator[tuple[Sign, str]]:
        yield from self._unread.signs(fields, layout, record)
        if isinstance(record, PreferencePair):
            yield from column_signs(fields, record, sides)


def _none_of(_: Conversation | PreferencePair) -> Iterator[tuple[Sign, str]]:
    return iter(())
