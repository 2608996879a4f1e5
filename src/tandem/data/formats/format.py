"""What a format is, sound texts of a row, and the reason when a row cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tandem.data.records import Origin, Record
from tandem.recipe.choices import RecordKind

Kind = RecordKind
Fields = Mapping[str, object]
# A row with one answer, in the keys `prompt`, `completion` and `label`.
ToUnpaired = Callable[[Fields], Fields]

# Keys of any format that hold the functions a model may call.
TOOL_KEYS = frozenset({"tools", "functions"})

_ANSWERS = ("chosen", "rejected", "output", "completion", "response")


class InvalidRecord(ValueError):  # noqa: N818  (not an error of the program: a verdict on a record)
    """A parsable record that cannot be trained on; the message is the reason."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


# Most rows hold one record and raise `InvalidRecord`; of a row with several, each has its verdict.
Reader = Callable[[Fields, Origin], Sequence[Record | InvalidRecord]]


@dataclass(frozen=True, slots=True)
class Format:
    """A known layout of rows: the keys that tell it, and how one row is read."""

    name: str  # for the recipe and for messages
    kind: Kind  # what its rows become
    keys: frozenset[str]  # all of them, and no others, tell the format
    read: Reader  # the records of a row; raises `InvalidRecord` for a row that holds none
    # more keys that are read when they are there; so are `TOOL_KEYS`, in all formats
    optional: frozenset[str] = frozenset()
    turns: bool = False  # whether turns, with roles and contents, are somewhere in it
    chat: bool = True  # whether its records are rendered by a chat template, with the row's tools
    # whether a row that has the keys can be of this format; None: any can
    suits: Callable[[Fields], bool] | None = None
    # what a recipe's `completions` must be for it, where formats differ in that
    completions: str | None = None
    # for rows that say whether their answer is a good one, those as KTO has them
    to_unpaired: ToUnpaired | None = None
    joins: bool = False  # whether its records are made of two rows each
    stated: bool = False  # whether a recipe says that rows are of it, whatever else they hold

    @property
    def id(self) -> str:
        """A unique identifier; formats that make other records of the same keys share a name."""
        labelled = "labelled" * (self.kind == "labelled answers")
        more = (self.completions, "joined" * self.joins, labelled, "stated" * self.stated)
        return ", ".join(filter(None, (self.name, *more)))

    def fits(self, fields: Fields) -> bool:
        """Return whether a row is of this format by what it holds."""
        return self.keys <= fields.keys() and (self.suits is None or self.suits(fields))

    @property
    def read_keys(self) -> frozenset[str]:
        """All keys that are read."""
        return self.keys | self.optional | (TOOL_KEYS if self.chat else frozenset())

    def unread(self, fields: Fields) -> set[str]:
        """Return the keys of a row that are not read; none of joined rows, which have new keys."""
        return set() if self.joins else set(fields) - self.read_keys


def text(fields: Fields, key: str) -> str:
    """Return the text in `key`; raise `InvalidRecord` when there is none, or an empty one."""
    value = fields.get(key)
    if value is None:
        raise InvalidRecord(f"`{key}` is null or missing")
    if not isinstance(value, str):
        raise InvalidRecord(f"`{key}` is not a text")
    if not value.strip():
        raise InvalidRecord("empty answer" if key in _ANSWERS else f"empty `{key}`", key)
    return sound(value)


def named(fields: Fields, names: Mapping[str, str]) -> dict[str, object]:
    """Return a row with its keys renamed: `names` has the row's own name of each key."""
    row = {key: value for key, value in fields.items() if key not in names}
    return row | {key: fields[name] for key, name in names.items() if name in fields}


def sound(value: str) -> str:
    """Return the text itself, if UTF-8 can encode it (JSON can spell half a surrogate pair)."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRecord("a text holds half of a surrogate pair") from error
    return value


def texts_in(value: object) -> Iterator[str]:
    """Yield every text in a row or a part of one, but no keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


def spelt(read: Reader, **names: str) -> Reader:
    """Return a reader for rows with other names, `key="name of the data"`; reasons use those."""

    def reader(fields: Fields, origin: Origin) -> list[Record | InvalidRecord]:
        try:
            return list(read(named(fields, names), origin))
        except InvalidRecord as verdict:
            reason = verdict.reason
            for key, name in names.items():
                reason = reason.replace(f"`{key}`", f"`{name}`")
            raise InvalidRecord(reason, verdict.detail) from verdict

    return reader
