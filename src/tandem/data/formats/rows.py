"""What a row is asked for: its keys, sound texts, and a reason when it cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tandem.data.records import Conversation, Origin, PreferencePair

Kind = Literal["conversations", "preference pairs"]
Fields = Mapping[str, object]

_ANSWERS = ("chosen", "rejected", "output", "completion", "response")


class Unusable(ValueError):  # noqa: N818  (not an error of the program: a verdict on a record)
    """A parsable record that cannot be trained on; the message is the reason."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


Record = Conversation | PreferencePair
# Most rows hold one record and raise `Unusable`; where a row holds several, each has its verdict.
Reader = Callable[[Fields, Origin], Sequence[Record | Unusable]]


@dataclass(frozen=True, slots=True)
class Format:
    """A known layout of rows: the keys that tell it, and how one row is read.

    Attributes:
        name: for the recipe and for messages.
        kind: what its rows become.
        keys: all of them, and no others, tell the format.
        read: the records of a row; raises `Unusable` for a row that holds none.
        optional: more keys that are read when they are there; so is `tools`, in all formats.
        turns: whether turns, with roles and contents, are somewhere in it.
        suits: whether a row that has the keys can be of this format; None: any can.
        completions: what a recipe's `completions` must be for it, where formats differ in that.
        joins: whether its records are made of two rows each.
    """

    name: str
    kind: Kind
    keys: frozenset[str]
    read: Reader
    optional: frozenset[str] = frozenset()
    turns: bool = False
    suits: Callable[[Fields], bool] | None = None
    completions: str | None = None
    joins: bool = False

    @property
    def id(self) -> str:
        """What no other format has, for the program itself; some that read other records of the
        same keys share a name."""
        return ", ".join(filter(None, (self.name, self.completions, "joined" * self.joins)))

    def fits(self, fields: Fields) -> bool:
        """Whether a row is of this format by what it holds."""
        return self.keys <= fields.keys() and (self.suits is None or self.suits(fields))

    def unread(self, fields: Fields) -> set[str]:
        """The keys of a row that are not read; none of joined rows, which are not as they were."""
        return set() if self.joins else set(fields) - self.keys - self.optional - {"tools"}


def text(fields: Fields, key: str) -> str:
    """The text in `key`; raises `Unusable` when there is none, or an empty one."""
    value = fields.get(key)
    if value is None:
        raise Unusable(f"`{key}` is null or missing")
    if not isinstance(value, str):
        raise Unusable(f"`{key}` is not a text")
    if not value.strip():
        raise Unusable("empty answer" if key in _ANSWERS else f"empty `{key}`", key)
    return sound(value)


def sound(value: str) -> str:
    """The text itself, if it can be encoded (JSON can spell half a surrogate pair)."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Unusable("a text holds half of a surrogate pair") from error
    return value


def texts_in(value: object) -> Iterator[str]:
    """Every text in a row or a part of one, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)
