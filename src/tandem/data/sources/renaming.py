"""The data's own names for keys and roles, as a recipe states them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tandem.data.formats.format import Fields
from tandem.data.records import Unreadable

# Keys that a turn's own names can be given for, and the columns that turns may be in.
TURN_KEYS = frozenset({"role", "content", "weight"})
_ROLE_NAMES = ("role", "from")
# What ShareGPT calls a turn's keys; readers take either.
_SAME = {"role": "from", "content": "value"}
_TURN_COLUMNS = (
    "conversations", "messages", "conversation", "prompt", "completion", "response", "chosen",
    "rejected",
)  # fmt: skip


Names = tuple[tuple[str, str], ...]


def led_into(fields: Names) -> frozenset[str]:
    """The keys of rows that a recipe's names lead into: `answers` of `answers.good`.

    `fields` are keys of a format, each with the data's name for it.
    """
    return frozenset(name.partition(".")[0] for key, name in fields if key not in TURN_KEYS)


@dataclass(frozen=True, slots=True)
class Renaming:
    """What a source's names mean.

    `fields` are keys of a format, each with the data's name for it (`a.b` is `b` within `a`);
    `roles` are the data's names of roles, each with the role it means.
    """

    fields: Names = ()
    roles: Names = ()

    def __bool__(self) -> bool:
        return bool(self.fields or self.roles)

    def apply(self, fields: Fields) -> dict[str, object]:
        """A row, and its turns, under the format's names."""
        row = _moved(fields, [one for one in self.fields if one[0] not in TURN_KEYS])
        names = [one for one in self.fields if one[0] in TURN_KEYS]
        roles = dict(self.roles)
        if names or roles:
            for column in _TURN_COLUMNS:
                if column in row:
                    row[column] = _renamed(row[column], names, roles)
        return row

    def unused(self, fields: Fields) -> tuple[set[str], set[str]]:
        """The data's names of keys, and of roles, that a row does not have."""
        keys = {name for key, name in self.fields if key not in TURN_KEYS}
        missing = {name for name in keys if not reach(fields, name)[0]}
        row = Renaming(tuple(one for one in self.fields if one[0] not in TURN_KEYS)).apply(fields)
        turns = [turn for column in _TURN_COLUMNS for turn in _turns(row.get(column))]
        own = {name for key, name in self.fields if key in TURN_KEYS}
        missing |= {name for name in own if not any(reach(turn, name)[0] for turn in turns)}
        role_names = [name for key, name in self.fields if key == "role"] or _ROLE_NAMES
        spoken = [reach(turn, name) for turn in turns for name in role_names]
        said = {str(role) for found, role in spoken if found}
        return missing, {role for role, _ in self.roles} - said


def reach(fields: Fields, name: str) -> tuple[bool, object]:
    """Whether a row has something under a name, and what; dots lead into nested objects."""
    if name in fields:
        return True, fields[name]
    head, dot, rest = name.partition(".")
    inner = fields.get(head)
    if dot and isinstance(inner, Unreadable):
        return True, inner
    return reach(inner, rest) if dot and isinstance(inner, Mapping) else (False, None)


def _moved(fields: Fields, names: Sequence[tuple[str, str]]) -> dict[str, object]:
    """Fields under the format's names; what was renamed is no longer there under its old one.

    A key that is renamed is only ever what the recipe says: fields without it lack it.
    """
    gone = {one for pair in names for one in pair}
    gone |= {_SAME[key] for key, _ in names if key in _SAME}
    moved = {key: value for key, value in fields.items() if key not in gone}
    for key, name in names:
        found, value = reach(fields, name)
        if found:
            moved[key] = value
    return moved


def _turns(value: object) -> list[Fields]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, Mapping)]


def _renamed(value: object, names: Sequence[tuple[str, str]], roles: Mapping[str, str]) -> object:
    if isinstance(value, list):
        return [_renamed(item, names, roles) for item in value]
    if not isinstance(value, Mapping):
        return value
    turn = _moved(value, names)
    for key in _ROLE_NAMES:
        role = turn.get(key)
        if isinstance(role, str) and role in roles:
            turn[key] = roles[role]
    return turn
