"""The signs in a row's other columns: what is not read, and which answer they prefer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from tandem.data.chunks import BadLine, Row
from tandem.data.formats import Format, Kind, format_with
from tandem.data.formats.mapping import Names, led_into
from tandem.data.records import Conversation, PreferencePair
from tandem.diagnose.findings import Sign
from tandem.diagnose.sides import Sides, column_signs, sides_of
from tandem.diagnose.unread import Unread

# The signs beside a record, each with what its row says.
Beside = Callable[[Conversation | PreferencePair], Iterator[tuple[Sign, str]]]


class Columns:
    """Looks at the columns of a pass, piece by piece.

    Args:
        kind: what the rows become.
    """

    def __init__(self, kind: Kind) -> None:
        self._unread = Unread(kind)

    @property
    def unread(self) -> tuple[str, ...]:
        """The keys that no row's and no turn's reader took, in order."""
        return self._unread.keys

    @property
    def unread_cut(self) -> bool:
        """Whether there are more of them."""
        return self._unread.cut

    def joined(self, rows: Iterable[Row | BadLine], known: Format, names: Names) -> None:
        """Note the keys of rows as they were before they were joined, see `beside`."""
        self._note(
            (row.fields for row in rows if isinstance(row, Row)),
            replace(known, joins=False),
            led_into(names),
        )

    def _note(
        self, rows: Iterable[Mapping[str, object]], layout: Format, led: frozenset[str]
    ) -> None:
        for row in rows:
            # One of another format is dropped, which is said of it.
            if layout.keys <= row.keys():
                self._unread.note(row, layout, led)

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
        layout, sides, led = format_with(known), sides_of(names), led_into(names)
        if not layout.joins:
            self._note(fields.values(), layout, led)
        return lambda record: self._signs(fields[record.origin.row], layout, led, sides, record)

    def _signs(
        self,
        fields: Mapping[str, object],
        layout: Format,
        led: frozenset[str],
        sides: Sides,
        record: Conversation | PreferencePair,
    ) -> Iterator[tuple[Sign, str]]:
        yield from self._unread.signs(fields, layout, led, record)
        if isinstance(record, PreferencePair):
            yield from column_signs(fields, record, sides)


def _none_of(_: Conversation | PreferencePair) -> Iterator[tuple[Sign, str]]:
    return iter(())
