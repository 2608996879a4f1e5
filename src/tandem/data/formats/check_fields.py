"""Check what a recipe says about a source's rows: it must apply to them and change something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import TYPE_CHECKING

from tandem.data.formats.conversations import QUESTION_KEYS
from tandem.data.formats.format import Format
from tandem.data.formats.turns import known_role, read_keys
from tandem.data.records import Unreadable
from tandem.data.sources.chunks import TURN_KEYS, Chunk, Row, led_into
from tandem.data.sources.rows import renaming_of, unrenamed_rows
from tandem.errors import UserError, nearest

if TYPE_CHECKING:
    from tandem.recipe.data_source import DataSource


def check_meaning(source: DataSource, known: Format) -> None:
    """Raise `UserError` for a name, a role or a choice that has no effect in a source's format."""
    check_use(source)  # first, for a misspelt name may lead to another format
    keys = known.read_keys | (TURN_KEYS if known.turns else set())
    _check_keys(source, keys, f"the format {known.name}")
    if source.completions is not None and known.completions is None:
        raise UserError(
            f"data: {source.path}: `completions: {source.completions}` chooses between scored "
            f"answers, but the format is {known.name}. Remove it."
        )
    if source.roles and not known.turns:
        raise UserError(
            f"data: {source.path}: `roles` renames who speaks, but the format {known.name} has no "
            "turns. Remove it."
        )
    for name, role in sorted(source.roles.items()):
        if known_role(name) == role:
            raise UserError(
                f"data: {source.path}: `roles: {{{name}: {role}}}` changes nothing, because "
                f"{name!r} means that anyway. Remove it."
            )


def check_question_meaning(source: DataSource) -> None:
    """Raise `UserError` for a setting of a source of questions that has no effect."""
    for name in ("format", "roles", "completions"):
        if name in source.meaning:
            raise UserError(
                f"data: {source.path}: `{name}` has no effect on questions, which have one format. "
                "Remove it."
            )
    _check_keys(source, QUESTION_KEYS, "a question")
    check_use(source)


def _check_keys(source: DataSource, keys: Set[str], what: str) -> None:
    for key, name in sorted(source.fields.items()):
        if key not in keys:
            raise UserError(
                f"data: {source.path}: `fields` says what {key!r} is called, but {what} has no "
                f"such key.{nearest(key, sorted(keys))} It has: {', '.join(sorted(keys))}."
            )
        if key == name:
            raise UserError(
                f"data: {source.path}: `fields: {{{key}: {name}}}` changes nothing. Remove it."
            )


def check_use(source: DataSource) -> None:
    """Raise `UserError` for a name that no row has; usually the first row has them all."""
    renaming = renaming_of(source)
    if not renaming:
        return
    names: set[str] | None = None
    roles: set[str] = set()
    columns: dict[str, None] = {}
    for row in unrenamed_rows(source):
        unused = renaming.unused(row.fields)
        names, roles = unused if names is None else (names & unused[0], roles & unused[1])
        columns |= dict.fromkeys(map(str, row.fields))
        if not names and not roles:
            return
    if names:
        name = min(names)
        raise UserError(
            f"data: {source.path}: `fields` names {name!r}, which no row has."
            f"{nearest(name, columns)} The rows have: {', '.join(columns)}."
        )
    if roles:
        raise UserError(
            f"data: {source.path}: `roles` names {min(roles)!r}, but nobody speaks under that name "
            "in any row. Correct or remove it."
        )


# The keys that make an object a turn, and those that are read of one.
_SPEAKERS = {"role", "from"}
_OF_TURNS = read_keys("assistant") | read_keys("tool")


def unread_keys(chunks: Iterable[Chunk], known: Format, source: DataSource) -> tuple[str, ...]:
    """Return, sorted, the keys that are not read of the first row of the source's format.

    Later rows may have others: `tandem check` looks at them all. A key that the source's names lead
    into (`answers.good`) is read. `chunks` are the source's first ones, not joined yet.
    """
    rows = (row.fields for chunk in chunks for row in chunk.rows() if isinstance(row, Row))
    stated = source.format is not None
    first = next(
        (row for row in rows if known.fits(row) or (stated and known.keys <= row.keys())), {}
    )
    # Here rows are as they were, also those that are to be joined.
    names = led_into(renaming_of(source).fields)
    return tuple(sorted(map(str, replace(known, joins=False).unread(first) - names)))


def unreadable(fields: Mapping[str, object], keys: Set[str]) -> str:
    """Return what cannot be read of a row's columns under `keys`, and why; empty when all can be.

    Keys of a turn that are not read do not count.
    """
    reasons = (_lost_in(fields[key], str(key)) for key in fields if key in keys)
    return next(filter(None, reasons), "")


def unreadable_text(fields: Mapping[str, object]) -> str:
    """Return the same for the texts in all columns of a row; other values do not count."""
    reasons = (_lost_in(value, str(key), texts=True) for key, value in fields.items())
    return next(filter(None, reasons), "")


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
    reasons = (_lost_in(one, where, texts=texts) for where, one in inner)
    return next(filter(None, reasons), "")
