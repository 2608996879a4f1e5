"""Signs in a row's other columns: what is not read, and which answer of a pair they prefer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from tandem.check import column_words
from tandem.check.column_words import MEDIA, SideColumns, Sides, words_in, written
from tandem.check.findings import Sign
from tandem.check.record_signs import Beside, answer_of, texts_of
from tandem.check.unread_keys import UnreadKeys
from tandem.data.formats.format import Format, Kind, texts_in
from tandem.data.formats.known_formats import FORMATS, format_with
from tandem.data.formats.turns import known_role, read_keys
from tandem.data.records import ChatRecord, Conversation, Preference, Record
from tandem.data.sources.chunks import BadLine, Names, Row, led_into

SWAPPED_SCORE = Sign(
    "chosen_scored_lower", "a column scores chosen below rejected", "warning",
    "Swapped, unless lower is better in it: exchange chosen and rejected.", of="pairs",
)  # fmt: skip
SWAPPED_LABEL = Sign(
    "label_prefers_rejected", "a column says that rejected is the preferred answer", "warning",
    "Swapped, most likely: exchange chosen and rejected.", of="pairs",
)  # fmt: skip
EQUAL = Sign(
    "equal_scores", "a column scores chosen and rejected alike, or calls them a tie", "note",
    "There is nothing to prefer by it: leave them out, unless another column decides.", of="pairs",
)  # fmt: skip

_REMEMBERED = 4096  # sets of keys; few data sets have many
_SHORT = 3  # texts of so few characters are in any other by chance


def verdict_sign(column: str, known: Format) -> Sign:
    """Return the sign that a column which is not read calls an answer bad."""
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
        "verdict_not_read", f"`{column}` says that the answer is bad, and is not read", "warning",
        f"They are trained like all others: leave these rows out, or {way}.", about=column,
    )  # fmt: skip


def meaning_sign(column: str, key: str, known: Format) -> Sign:
    """Return the sign that a column which is not read is a part of the question or the answer.

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
        "meaning_not_read", f"`{column}` is not read, and may change what is asked or answered",
        "warning", hint, about=column,
    )  # fmt: skip


Fields = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Layout:
    """The columns to inspect in rows of the same format and keys.

    `verdicts` are columns with whether true is bad; `meanings` are columns with a format's key for
    the same; `turns` are columns that may hold turns.
    """

    unread: tuple[str, ...]
    verdicts: tuple[tuple[str, bool], ...]
    meanings: tuple[tuple[str, str], ...]
    turns: tuple[str, ...]


@dataclass(slots=True)
class Columns:
    """Inspects columns, chunk by chunk, and collects the keys that no reader takes.

    `kind` is what the rows become.
    """

    kind: Kind
    _keys: UnreadKeys = field(default_factory=UnreadKeys)
    _layouts: dict[tuple[object, ...], _Layout] = field(default_factory=dict)
    _odd: dict[tuple[object, ...], tuple[str, ...]] = field(default_factory=dict)
    _verdict_signs: dict[tuple[str, str], Sign] = field(default_factory=dict)
    _meaning_signs: dict[tuple[str, str], Sign] = field(default_factory=dict)

    def take_keys(self) -> UnreadKeys:
        """Return the keys that are not read of the rows since the last call."""
        keys, self._keys = self._keys, UnreadKeys()
        return keys

    def joined(self, rows: Iterable[Row | BadLine], known: Format, names: Names) -> None:
        """Note the keys of rows before they were joined; see `beside`."""
        fields = (row.fields for row in rows if isinstance(row, Row))
        self._note(fields, replace(known, joins=False), led_into(names))

    def beside(self, rows: Sequence[Row | BadLine], known: str, names: Names) -> Beside:
        """Note the keys of a chunk's rows; return a function that yields each record's signs.

        `known` is the id of their format, empty without one; `names` are a recipe's, pairs of a
        format's key and the data's own. The keys that they lead into count as read.
        """
        fields = {row.origin.row: row.fields for row in rows if isinstance(row, Row)}
        if not known:
            return lambda _: ()
        known_format, led = format_with(known), led_into(names)
        sides = column_words.sides_of(names)
        if not known_format.joins:
            self._note(fields.values(), known_format, led)

        def signs(record: Record) -> Iterator[tuple[Sign, str]]:
            if not isinstance(record, Conversation | Preference):
                return  # the columns beside may well be what the tokens were made of
            row = fields[record.origin.row]
            yield from self._signs(row, known_format, led, record)
            if isinstance(record, Preference):
                yield from column_signs(row, record, sides)

        return signs

    def _note(self, rows: Iterable[Fields], known: Format, led: Set[str]) -> None:
        for row in rows:
            if not known.keys <= row.keys():  # a row of another format is dropped and reported
                continue
            layout = self._layout(row, known, led)
            for key in layout.unread:
                self._keys.add(key)
            for column in layout.turns:
                value = row[column]
                for item in value if isinstance(value, list) else (value,):
                    if isinstance(item, Mapping):
                        self._note_turn(column, item)

    def _note_turn(self, column: str, turn: Fields) -> None:
        name = turn.get("role", turn.get("from"))
        role = known_role(name) if isinstance(name, str) else None
        memo = (column, role, *turn)
        odd = self._odd.get(memo)
        if odd is None:
            if len(self._odd) >= _REMEMBERED:
                self._odd.clear()
            # Exchanges (`input` and `output`) have no roles; objects with neither are no turns.
            exchange = {"input", "output"} if column == "conversation" else set()
            read = read_keys(role) | exchange
            is_turn = "role" in turn or "from" in turn or (exchange and exchange <= turn.keys())
            odd = tuple(key for key in turn if key not in read) if is_turn else ()
            self._odd[memo] = odd
        for key in odd:
            # In tables, every turn has the keys of all turns.
            if turn[key] is not None:
                self._keys.add(f"{column}[].{key}")

    def _signs(
        self, fields: Fields, known: Format, led: Set[str], record: ChatRecord
    ) -> Iterator[tuple[Sign, str]]:
        """Yield signs, with a text, that other columns of a row should have been read."""
        layout = self._layout(fields, known, led)
        for column, bad in layout.verdicts:
            if _says(fields[column], column) is bad:
                memo = (column, known.id)
                sign = self._verdict_signs.get(memo) or verdict_sign(column, known)
                self._verdict_signs[memo] = sign
                yield sign, f"{column}: {_shown(fields[column])} | {answer_of(record)}"
        for column, key in layout.meanings:
            lost = _lost(column, fields[column], record)
            if lost is not None:
                memo = (column, known.id)
                sign = self._meaning_signs.get(memo) or meaning_sign(column, key, known)
                self._meaning_signs[memo] = sign
                yield sign, lost

    def _layout(self, fields: Fields, known: Format, led: Set[str]) -> _Layout:
        memo = (known.id, led, *fields)
        layout = self._layouts.get(memo)
        if layout is None:
            if len(self._layouts) >= _REMEMBERED:
                self._layouts.clear()
            unread = known.unread(fields) - led
            names = [name for name in fields if name in unread]
            answers = names if self.kind == "conversations" else []
            layout = self._layouts[memo] = _Layout(
                tuple(sorted(unread)),
                tuple(column_words.verdict_columns(answers)),
                tuple(column_words.meaning_columns(names, self.kind)),
                tuple(name for name in fields if name in known.keys | known.optional),
            )
        return layout


def _says(value: object, name: str) -> bool | None:
    """Return a verdict as a truth value; None if it is not one."""
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower() if isinstance(value, str | int | float) else ""
    if text in ("true", "false"):
        return text == "true"
    if words_in(name)[-1] in column_words.GRADES:
        return None
    return {"1": True, "1.0": True, "yes": True, "0": False, "0.0": False, "no": False}.get(text)


def _lost(column: str, value: object, record: ChatRecord) -> str | None:
    """Return the longest text of a column that is nowhere in the record; None without one."""
    if value is None or isinstance(value, bool | int | float):
        return None
    plain = column.lower().replace("-", "_")
    if plain == column_words.TEMPLATE_OPTIONS or MEDIA.fullmatch(plain):
        return f"{column}: {_shown(value)}" if _holds(value) else None
    texts = [
        text
        for text in map(str.strip, texts_in(value))
        if text.lower() not in column_words.SWITCHES and known_role(text) is None
    ]
    if not texts:
        return None
    whole = "\n".join((record.tools, *(text for _, text in texts_of(record))))
    lost = max((text for text in texts if not _is_in(text, whole)), key=len, default=None)
    return None if lost is None else f"{column}: {lost}"


def _is_in(text: str, whole: str) -> bool:
    """Return whether a text is part of another, a short one as whole words."""
    if text not in whole:
        return False
    return len(text) > _SHORT or bool(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", whole))


def _holds(value: object) -> bool:
    """Return whether a value has anything that is not null or empty; false counts."""
    if isinstance(value, Mapping | list | tuple):
        return any(map(_holds, value.values() if isinstance(value, Mapping) else value))
    return value is not None and value not in ("", b"")


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)[:400]


def column_signs(
    fields: Mapping[str, object], pair: Preference, sides: Sides
) -> Iterator[tuple[Sign, str]]:
    """Yield signs in a pair's other columns that it is swapped or a tie, with their content."""
    columns = column_words.side_columns(tuple(fields), sides)
    scored = scores_in(fields, columns)
    lower = next((one for one in scored if one[2] < one[3]), None)
    if lower is not None:
        yield SWAPPED_SCORE, _scores(lower)
    named = _named(fields, pair, sides, columns)
    if named is not None:
        yield SWAPPED_LABEL, named
    if lower is not None or named is not None:
        return
    # Columns without `score` in their names, such as turns, may be equal for other reasons.
    meant = [one for one in scored if one[4]]
    if meant and all(one[2] == one[3] for one in meant):
        yield EQUAL, _scores(meant[0])
    elif (tie := _tie(fields, columns)) is not None:
        yield EQUAL, tie


def scores_in(
    fields: Mapping[str, object], columns: SideColumns
) -> list[tuple[str, str, float, float, bool]]:
    """Return both columns and numbers of each score that a row has for both answers."""
    scores = []
    for good, bad, meant in columns.scores:
        a, b = fields[good], fields[bad]
        if isinstance(a, bool) or isinstance(b, bool):
            continue
        if isinstance(a, int | float) and isinstance(b, int | float):
            scores.append((good, bad, a, b, meant))
    return scores


def _scores(one: tuple[str, str, float, float, bool]) -> str:
    good, bad, a, b, _ = one
    return f"{good} {written(a)}, {bad} {written(b)}"


def _named(
    fields: Mapping[str, object], pair: Preference, sides: Sides, columns: SideColumns
) -> str | None:
    """Return a column and its value that prefer the rejected answer, if there is one."""
    rejected = pair.rejected.strip()
    for name, numbers in columns.labels:
        value = fields[name]
        rejects = sides.rejects(value, numbers=numbers)
        quoted = isinstance(value, str) and len(value.strip()) > 1 and value.strip() == rejected
        if rejects or (rejects is None and quoted):
            return f"{name}: {value}"
    for good, bad in columns.verdicts:
        if fields[good] is False and fields[bad] is True:
            return f"{good}: false, {bad}: true"
    return None


def _tie(fields: Mapping[str, object], columns: SideColumns) -> str | None:
    """Return a column and its value that call the answers a tie, if there is one."""
    names: Sequence[str] = [*(name for name, _ in columns.labels), "status"]
    for name in names:
        value = fields.get(name)
        if isinstance(value, str):
            short = len(value) <= column_words.LONGEST_NAME
            tied = short and not column_words.TIES.isdisjoint(words_in(value)[:1])
        else:
            tied = value in (True, 1) and "tie" in words_in(name)
        if tied:
            return f"{name}: {value}"
    return None
