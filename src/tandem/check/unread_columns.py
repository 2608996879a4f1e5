"""The signs in a row's other columns: what is not read, and which answer they prefer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from tandem.check.findings import Sign
from tandem.check.preference_columns import Sides, column_signs, sides_of, words_in
from tandem.check.record_signs import answer_of, texts_of
from tandem.data.formats.format import Format, Kind, texts_in
from tandem.data.formats.known_formats import FORMATS, format_with
from tandem.data.formats.turns import known_role, read_keys
from tandem.data.records import Conversation, PreferencePair
from tandem.data.sources.chunks import BadLine, Row
from tandem.data.sources.renaming import Names, led_into

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


# Sets of keys that are remembered; there are few but in rows that are made to have many.
_REMEMBERED = 4096

# Names of columns that say whether an answer is a good one.
_VERDICTS = frozenset({
    "label", "correct", "correctness", "good", "accepted", "acceptable", "preferred", "passed",
    "safe", "valid", "desirable", "solved", "resolved", "success", "successful",
})  # fmt: skip
_BAD_VERDICTS = frozenset({"incorrect", "wrong", "unsafe"})
_TAGS = frozenset({"kto_tag"})
# Names of columns whose numbers are classes or grades as often as truth values.
_NUMBERED = frozenset({"label", "correctness"})

# Names of columns that change what is asked or answered, and a format's key that has the same.
_SAME = {
    "history": "history", "system_prompt": "system", "system_message": "system",
    "functions": "tools", "context": "input", "choices": "", "options": "",
}  # fmt: skip
_MEDIA = re.compile(r"(?:image|video|audio)s?(?:_(?:path|url|file|bytes)s?)?")
_KWARGS = "chat_template_kwargs"
_REASONING = frozenset({"cot", "reasoning", "thinking", "thought", "thoughts"})
# Beside those words: something about reasoning, or that of a judge; and where it is said behind.
_NOT_REASONING = frozenset({
    "is", "has", "use", "num", "number", "count", "enable", "enabled", "budget", "judge", "finish",
})  # fmt: skip
_OF_REASONING = frozenset({
    "type", "language", "lang", "token", "tokens", "length", "len", "effort", "mode", "level",
    "model", "complete", "completed", "score", "id", "source", "time", "category", "version",
    "rating", "quality", "difficulty", "topic", "domain",
})  # fmt: skip
_NOT_ANSWERS = frozenset({
    "model", "models", "source", "score", "scores", "rating", "ratings", "reward", "rewards",
    "reason", "by", "at", "rank", "id", "token", "tokens", "length", "len", "logp", "logps",
    "policy", "generator", "type", "count",
})  # fmt: skip
# Texts that switch reasoning on and off, or say that there is none.
_SWITCHES = frozenset({
    "", "on", "off", "true", "false", "yes", "no", "none", "null", "n/a", "auto", "low", "medium",
    "high",
})  # fmt: skip

# Keys that are listed at most; rows whose keys are names of things have one each.
_MOST = 1000
# Texts of so few characters are found in any other.
_SHORT = 3


def verdict_sign(column: str, known: Format) -> Sign:
    """The sign that a column which is not read calls an answer bad."""
    labelled = next((one.name for one in FORMATS if one.labelled and one.keys == known.keys), None)
    if known.keys == {"prompt", "completion"}:
        labelled = "unpaired preference"
    if known.labelled and column != "label":
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

    Args:
        column: its name.
        key: a format's key for the same, if there is one.
        known: the rows' format.
    """
    words = set(words_in(column))
    if key and key in known.keys | known.optional | {"tools"}:
        hint = f"Name it with --fields {key}={column} (in a recipe `fields`), or it is not trained."
    elif "rejected" in words:
        hint = (
            "A preference set read for SFT: for DPO name `chosen` and `rejected` with --fields (in "
            "a recipe `fields`), or leave the column out."
        )
    elif _MEDIA.fullmatch(column.lower()):
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
class Unread:
    """Gathers what a pass meets and a run does not read.

    Args:
        kind: what the rows become.

    Attributes:
        cut: whether there are more keys than are kept.

    `led` are the keys of a source that a recipe's names lead into, which is reading them.
    """

    kind: Kind
    cut: bool = False
    _keys: set[str] = field(default_factory=set)
    _layouts: dict[tuple[object, ...], _Layout] = field(default_factory=dict)
    _odd: dict[tuple[object, ...], tuple[str, ...]] = field(default_factory=dict)
    _signs: dict[tuple[str, str], Sign] = field(default_factory=dict)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are not read, of rows and of turns (`messages[].thought`), in order."""
        return tuple(sorted(self._keys))

    def note(self, fields: Mapping[str, object], known: Format, led: Set[str]) -> None:
        """Note the keys of a row and its turns."""
        layout = self._layout(fields, known, led)
        for key in layout.unread:
            self._keep(key)
        for column in layout.turns:
            value = fields[column]
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

    def _note_turn(self, column: str, turn: Mapping[str, object]) -> None:
        said = turn.get("role", turn.get("from"))
        role = known_role(said) if isinstance(said, str) else None
        memo = (column, role, *turn)
        odd = self._odd.get(memo)
        if odd is None:
            _make_room(self._odd)
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

    def signs(
        self,
        fields: Mapping[str, object],
        known: Format,
        led: Set[str],
        record: Conversation | PreferencePair,
    ) -> Iterator[tuple[Sign, str]]:
        """The signs that what a row holds beside its record should have been read, with a text."""
        layout = self._layout(fields, known, led)
        for column, bad in layout.verdicts:
            if _says(fields[column], column) is bad:
                sign = self._sign(column, known, None)
                yield sign, f"{column}: {_shown(fields[column])} | {answer_of(record)}"
        for column, key in layout.meanings:
            lost = _lost(column, fields[column], record)
            if lost is not None:
                yield self._sign(column, known, key), lost

    def _sign(self, column: str, known: Format, key: str | None) -> Sign:
        memo = ("verdict" if key is None else "meaning", column)
        if memo not in self._signs:
            self._signs[memo] = (
                verdict_sign(column, known) if key is None else meaning_sign(column, key, known)
            )
        return self._signs[memo]

    def _layout(self, fields: Mapping[str, object], known: Format, led: Set[str]) -> _Layout:
        memo = (known.id, led, *fields)
        layout = self._layouts.get(memo)
        if layout is None:
            _make_room(self._layouts)
            unread = known.unread(fields) - led
            names = [name for name in fields if name in unread]
            layout = _Layout(
                tuple(sorted(unread)),
                tuple(_verdicts(names)) if self.kind == "conversations" else (),
                tuple(_meanings(names, self.kind)),
                tuple(name for name in fields if name in known.keys | known.optional),
            )
            self._layouts[memo] = layout
        return layout


def _make_room(
    memo: dict[tuple[object, ...], _Layout] | dict[tuple[object, ...], tuple[str, ...]],
) -> None:
    if len(memo) >= _REMEMBERED:
        memo.clear()


def _verdicts(names: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Columns that are called as verdicts are, and whether true is the bad one in them."""
    for name in names:
        words = words_in(name)
        # `is_response_safe`, `tests_passed`; but not `label_source`.
        if name.lower() in _TAGS or (words and words[-1] in _VERDICTS):
            yield name, False
        elif words and words[-1] in _BAD_VERDICTS:
            yield name, True


def _says(value: object, name: str) -> bool | None:
    """What a verdict says; None for what is no truth value."""
    if isinstance(value, bool):
        return value
    said = str(value).strip().lower() if isinstance(value, str | int | float) else ""
    if said in ("true", "false"):
        return said == "true"
    if words_in(name)[-1] in _NUMBERED:
        return None
    return {"1": True, "1.0": True, "yes": True, "0": False, "0.0": False, "no": False}.get(said)


def _meanings(names: Sequence[str], kind: Kind) -> Iterator[tuple[str, str]]:
    """Columns that are called as parts of a question or an answer, and a format's key for them."""
    for name in names:
        plain = name.lower().replace("-", "_")
        # Both ways, for CoT is one word.
        parts = re.split(r"[^a-z0-9]+", plain)
        words = {*words_in(name), *parts}
        if plain in _SAME:
            yield name, _SAME[plain]
        elif (
            plain == _KWARGS
            or _MEDIA.fullmatch(plain)
            or _is_reasoning(words, parts[-1], kind)
            or (kind == "conversations" and _is_answer(words_in(name)))
        ):
            yield name, ""


def _is_answer(words: Sequence[str]) -> bool:
    """Whether a name is that of a rejected answer."""
    return "rejected" in (*words[:1], *words[-1:]) and _NOT_ANSWERS.isdisjoint(words)


def _is_reasoning(words: Set[str], last: str, kind: Kind) -> bool:
    """Whether a name of these words is that of an answer's reasoning."""
    # Beside pairs it is most often a judge's, unless it is said to be an answer's.
    if kind == "preference pairs" and words.isdisjoint(("chosen", "rejected")):
        return False
    if words.isdisjoint(_REASONING) or not words.isdisjoint(_NOT_REASONING):
        return False
    return last in _REASONING or words.isdisjoint(_OF_REASONING)


def _lost(column: str, value: object, record: Conversation | PreferencePair) -> str | None:
    """What a column holds that is nowhere in the record; None for nothing."""
    if value is None or isinstance(value, bool | int | float):
        return None
    plain = column.lower().replace("-", "_")
    if plain == _KWARGS or _MEDIA.fullmatch(plain):
        return f"{column}: {_shown(value)}" if _holds(value) else None
    texts = [text for text in map(str.strip, texts_in(value)) if _is_said(text)]
    if not texts:
        return None
    said = "\n".join((record.tools, *(text for _, text in texts_of(record))))
    lost = max((text for text in texts if not _is_in(text, said)), key=len, default=None)
    return None if lost is None else f"{column}: {lost}"


def _is_said(text: str) -> bool:
    return text.lower() not in _SWITCHES and known_role(text) is None


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
