"""The signs in a row's other columns: what is not read, and which answer of a pair they prefer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from tandem.check.column_words import (
    GRADES,
    LONGEST_NAME,
    MEDIA,
    SWITCHES,
    TEMPLATE_OPTIONS,
    TIES,
    SideColumns,
    Sides,
    meaning_columns,
    side_columns,
    sides_of,
    verdict_columns,
    words_in,
    written,
)
from tandem.check.findings import Sign
from tandem.check.record_signs import Beside, answer_of, texts_of
from tandem.data.formats.format import Format, Kind, texts_in
from tandem.data.formats.known_formats import FORMATS, format_with
from tandem.data.formats.turns import known_role, read_keys
from tandem.data.records import Conversation, PreferencePair
from tandem.data.sources.chunks import BadLine, Names, Row, led_into

SWAPPED_SCORE = Sign(
    "chosen_scored_lower",
    "a column scores chosen below rejected",
    "warning",
    "Swapped, unless lower is better in it: exchange chosen and rejected.",
    of="pairs",
)
SWAPPED_LABEL = Sign(
    "label_prefers_rejected",
    "a column says that rejected is the preferred answer",
    "warning",
    "Swapped, most likely: exchange chosen and rejected.",
    of="pairs",
)
EQUAL = Sign(
    "equal_scores",
    "a column scores chosen and rejected alike, or calls them a tie",
    "note",
    "There is nothing to prefer by it: leave them out, unless another column decides.",
    of="pairs",
)

# Sets of keys that are remembered; only rows that are made so have many.
_REMEMBERED = 4096
# Keys that are listed at most; rows whose keys are names of things have one each.
_MOST = 1000
# Texts of so few characters are found in any other.
_SHORT = 3


def verdict_sign(column: str, known: Format) -> Sign:
    """The sign that a column which is not read calls an answer bad."""
    labelled = next(
        (one.name for one in FORMATS if one.to_unpaired and one.keys == known.keys), None
    )
    if known.keys == {"prompt", "completion"}:
        labelled = "unpaired preference"
    if known.to_unpaired and column != "label":
        way = f"say --fields label={column}"
    elif labelled is None:
        way = "name `prompt`, `completion` and `label` with --fields, which makes the set labelled"
    elif column == "label":
        way = f"say --format {labelled.replace(' ', '-')}"
    else:
        way = f"say --fields label={column}, which makes the set {labelled}"
    return Sign(
        "verdict_not_read",
        f"`{column}` says that the answer is bad, and is not read",
        "warning",
        f"They are trained like all others: leave these rows out, or {way}.",
        about=column,
    )


def meaning_sign(column: str, key: str, known: Format) -> Sign:
    """The sign that a column which is not read belongs to what is asked or answered.

    `key` is the format's key for the same, empty without.
    """
    words = set(words_in(column))
    if key and key in known.keys | known.optional | {"tools"}:
        hint = f"Name it with --fields {key}={column} (in a recipe `fields`), or it is not trained."
    elif "rejected" in words:
        hint = (
            "A preference set read for SFT: for DPO name `chosen` and `rejected` with --fields (in "
            "a recipe `fields`), or leave the column out."
        )
    elif MEDIA.fullmatch(column.lower()):
        hint = "Only text is trained: leave rows out whose texts need it."
    else:
        hint = "It is not trained: write it into the texts, or leave the column out."
    return Sign(
        "meaning_not_read",
        f"`{column}` is not read, and may change what is asked or answered",
        "warning",
        hint,
        about=column,
    )


Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Layout:
    """What is looked at in rows of the same format and keys.

    `verdicts` are columns with whether true is bad; `meanings` with a format's key for the same;
    `turns` are columns that turns may be in.
    """

    unread: tuple[str, ...]
    verdicts: tuple[tuple[str, bool], ...]
    meanings: tuple[tuple[str, str], ...]
    turns: tuple[str, ...]


@dataclass(slots=True)
class Columns:
    """Looks at the columns of a pass, chunk by chunk, and gathers the keys that no reader takes.

    `kind` is what the rows become; `cut` says that there are more such keys than are kept.
    """

    kind: Kind
    cut: bool = False
    _keys: set[str] = field(default_factory=set)
    _layouts: dict[tuple[object, ...], _Layout] = field(default_factory=dict)
    _odd: dict[tuple[object, ...], tuple[str, ...]] = field(default_factory=dict)
    _verdict_signs: dict[str, Sign] = field(default_factory=dict)
    _meaning_signs: dict[str, Sign] = field(default_factory=dict)

    @property
    def unread(self) -> tuple[str, ...]:
        """The keys that are not read, of rows and of turns (`messages[].thought`), in order."""
        return tuple(sorted(self._keys))

    def joined(self, rows: Iterable[Row | BadLine], known: Format, names: Names) -> None:
        """Note the keys of rows as they were before they were joined, see `beside`."""
        fields = (row.fields for row in rows if isinstance(row, Row))
        self._note(fields, replace(known, joins=False), led_into(names))

    def beside(self, rows: Sequence[Row | BadLine], known: str, names: Names) -> Beside:
        """Note a chunk's keys; what is returned tells the signs beside each of its records.

        Args:
            rows: the chunk's.
            known: the id of their format; empty for rows of none.
            names: a recipe's, key of the format and the data's own. The keys that they lead into
                count as read.
        """
        fields = {row.origin.row: row.fields for row in rows if isinstance(row, Row)}
        if not known:
            return lambda _: ()
        known_format, sides, led = format_with(known), sides_of(names), led_into(names)
        if not known_format.joins:
            self._note(fields.values(), known_format, led)

        def signs(record: Conversation | PreferencePair) -> Iterator[tuple[Sign, str]]:
            row = fields[record.origin.row]
            yield from self._signs(row, known_format, led, record)
            if isinstance(record, PreferencePair):
                yield from column_signs(row, record, sides)

        return signs

    def _note(self, rows: Iterable[Fields], known: Format, led: Set[str]) -> None:
        for row in rows:
            if not known.keys <= row.keys():  # a row of another format is dropped and reported
                continue
            layout = self._layout(row, known, led)
            for key in layout.unread:
                self._keep(key)
            for column in layout.turns:
                value = row[column]
                for item in value if isinstance(value, list) else (value,):
                    if isinstance(item, Mapping):
                        self._note_turn(column, item)

    def _keep(self, key: str) -> None:
        if key in self._keys:
            return
        if len(self._keys) < _MOST:
            self._keys.add(key)
        else:
            self.cut = True

    def _note_turn(self, column: str, turn: Fields) -> None:
        name = turn.get("role", turn.get("from"))
        role = known_role(name) if isinstance(name, str) else None
        memo = (column, role, *turn)
        odd = self._odd.get(memo)
        if odd is None:
            if len(self._odd) >= _REMEMBERED:
                self._odd.clear()
            # Exchanges have no roles; objects with neither are no turns.
            exchange = {"input", "output"} if column == "conversation" else set()
            read = read_keys(role) | exchange
            is_turn = "role" in turn or "from" in turn or (exchange and exchange <= turn.keys())
            odd = tuple(key for key in turn if key not in read) if is_turn else ()
            self._odd[memo] = odd
        for key in odd:
            # In tables, every turn has the keys of all.
            if turn[key] is not None:
                self._keep(f"{column}[].{key}")

    def _signs(
        self, fields: Fields, known: Format, led: Set[str], record: Conversation | PreferencePair
    ) -> Iterator[tuple[Sign, str]]:
        """The signs that what a row holds beside its record should have been read, with a text."""
        layout = self._layout(fields, known, led)
        for column, bad in layout.verdicts:
            if _says(fields[column], column) is bad:
                sign = self._verdict_signs.get(column) or verdict_sign(column, known)
                self._verdict_signs[column] = sign
                yield sign, f"{column}: {_shown(fields[column])} | {answer_of(record)}"
        for column, key in layout.meanings:
            lost = _lost(column, fields[column], record)
            if lost is not None:
                sign = self._meaning_signs.get(column) or meaning_sign(column, key, known)
                self._meaning_signs[column] = sign
                yield sign, lost

    def _layout(self, fields: Fields, known: Format, led: Set[str]) -> _Layout:
        memo = (known.id, led, *fields)
        layout = self._layouts.get(memo)
        if layout is None:
            if len(self._layouts) >= _REMEMBERED:
                self._layouts.clear()
            unread = known.unread(fields) - led
            names = [name for name in fields if name in unread]
            layout = self._layouts[memo] = _Layout(
                tuple(sorted(unread)),
                tuple(verdict_columns(names)) if self.kind == "conversations" else (),
                tuple(meaning_columns(names, self.kind)),
                tuple(name for name in fields if name in known.keys | known.optional),
            )
        return layout


def _says(value: object, name: str) -> bool | None:
    """What a verdict says; None for what is no truth value."""
    if isinstance(value, bool):
        return value
    said = str(value).strip().lower() if isinstance(value, str | int | float) else ""
    if said in ("true", "false"):
        return said == "true"
    if words_in(name)[-1] in GRADES:
        return None
    return {"1": True, "1.0": True, "yes": True, "0": False, "0.0": False, "no": False}.get(said)


def _lost(column: str, value: object, record: Conversation | PreferencePair) -> str | None:
    """What a column holds that is nowhere in the record; None for nothing."""
    if value is None or isinstance(value, bool | int | float):
        return None
    plain = column.lower().replace("-", "_")
    if plain == TEMPLATE_OPTIONS or MEDIA.fullmatch(plain):
        return f"{column}: {_shown(value)}" if _holds(value) else None
    texts = [text for text in map(str.strip, texts_in(value)) if _is_said(text)]
    if not texts:
        return None
    said = "\n".join((record.tools, *(text for _, text in texts_of(record))))
    lost = max((text for text in texts if not _is_in(text, said)), key=len, default=None)
    return None if lost is None else f"{column}: {lost}"


def _is_said(text: str) -> bool:
    return text.lower() not in SWITCHES and known_role(text) is None


def _is_in(text: str, said: str) -> bool:
    """Whether a text is part of what is said, a short one as words of its own."""
    if text not in said:
        return False
    return len(text) > _SHORT or bool(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said))


def _holds(value: object) -> bool:
    """Whether there is anything in a value that is not null or empty; false is something."""
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds, value))
    return value is not None and value not in ("", b"")


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)[:400]


def column_signs(
    fields: Mapping[str, object], pair: PreferencePair, sides: Sides
) -> Iterator[tuple[Sign, str]]:
    """The signs in a pair's other columns that it is the wrong way round, with what they say."""
    columns = side_columns(tuple(fields), sides)
    scored = scores_in(fields, columns)
    lower = next((one for one in scored if one[2] < one[3]), None)
    if lower is not None:
        yield SWAPPED_SCORE, _scores(lower)
    named = _named(fields, pair, sides, columns)
    if named is not None:
        yield SWAPPED_LABEL, named
    if lower is not None or named is not None:
        return
    # A column that does not call itself a score is equal by nature: turns, answers.
    meant = [one for one in scored if one[4]]
    if meant and all(one[2] == one[3] for one in meant):
        yield EQUAL, _scores(meant[0])
    elif (tie := _tie(fields, columns)) is not None:
        yield EQUAL, tie


def scores_in(
    fields: Mapping[str, object], columns: SideColumns
) -> list[tuple[str, str, float, float, bool]]:
    """Both columns and numbers of each score that a row has for both answers."""
    found = []
    for good, bad, meant in columns.scores:
        a, b = fields[good], fields[bad]
        if _is_number(a) and _is_number(b):
            assert isinstance(a, int | float)
            assert isinstance(b, int | float)
            found.append((good, bad, a, b, meant))
    return found


def _scores(one: tuple[str, str, float, float, bool]) -> str:
    good, bad, a, b, _ = one
    return f"{good} {written(a)}, {bad} {written(b)}"


def _named(
    fields: Mapping[str, object], pair: PreferencePair, sides: Sides, columns: SideColumns
) -> str | None:
    """What a column says by which the rejected answer is the preferred one."""
    for name, numbers in columns.labels:
        value = fields[name]
        rejects = sides.rejects(value, numbers=numbers)
        if rejects or (rejects is None and _is_text(value, pair.rejected)):
            return f"{name}: {value}"
    for good, bad in columns.verdicts:
        if fields[good] is False and fields[bad] is True:
            return f"{good}: false, {bad}: true"
    return None


def _tie(fields: Mapping[str, object], columns: SideColumns) -> str | None:
    """What a column says that calls the answers a tie."""
    names: Sequence[str] = [*(name for name, _ in columns.labels), "status"]
    for name in names:
        value = fields.get(name)
        if isinstance(value, str):
            tied = len(value) <= LONGEST_NAME and not TIES.isdisjoint(words_in(value)[:1])
        else:
            tied = value in (True, 1) and "tie" in words_in(name)
        if tied:
            return f"{name}: {value}"
    return None


def _is_text(value: object, text: str) -> bool:
    return isinstance(value, str) and len(value.strip()) > 1 and value.strip() == text.strip()


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
