"""Whether what a recipe says about a source's rows can apply to them, and changes anything."""

from __future__ import annotations

from collections.abc import Set

from tandem.data.formats import QUESTION_KEYS, QUESTION_OPTIONS, Format
from tandem.data.formats.mapping import TURN_KEYS
from tandem.data.formats.turns import known_role
from tandem.data.sources import SourceSpec, unrenamed_rows
from tandem.errors import UserError, nearest


def check_meaning(source: SourceSpec, known: Format) -> None:
    """Raise `UserError` for a name, a role or a choice that has no effect in a source's format."""
    check_use(source)  # first, for a misspelt name may lead to another format
    keys = known.read_keys | (TURN_KEYS if known.turns else set())
    _check_keys(source, keys, f"the format {known.name}")
    if source.completions is not None and "completions" not in known.keys:
        raise UserError(
            f"data: {source.path}: `completions: {source.completions}` chooses between scored "
            f"answers (UltraFeedback), but the format is {known.name}. Remove it."
        )
    if source.roles and not known.turns:
        raise UserError(
            f"data: {source.path}: `roles` renames who speaks, but the format {known.name} has no "
            "turns. Remove it."
        )
    for name, role in source.roles:
        if known_role(name) == role:
            raise UserError(
                f"data: {source.path}: `roles: {{{name}: {role}}}` changes nothing, for "
                f"{name!r} means that anyway. Remove it."
            )


def check_question_meaning(source: SourceSpec) -> None:
    """Raise `UserError` for what a source of questions is said to be and has no effect."""
    said = [name for name in ("format", "roles", "completions") if name in source.meaning]
    if said:
        raise UserError(
            f"data: {source.path}: `{said[0]}` has no effect on questions, which have one format. "
            "Remove it."
        )
    _check_keys(source, QUESTION_KEYS | QUESTION_OPTIONS, "a question")
    check_use(source)


def _check_keys(source: SourceSpec, keys: Set[str], what: str) -> None:
    for key, name in source.fields:
        if key not in keys:
            raise UserError(
                f"data: {source.path}: `fields` says what {key!r} is called, but {what} has no "
                f"such key.{nearest(key, sorted(keys))} It has: {', '.join(sorted(keys))}."
            )
        if key == name:
            raise UserError(
                f"data: {source.path}: `fields: {{{key}: {name}}}` changes nothing. Remove it."
            )


def check_use(source: SourceSpec) -> None:
    """Raise `UserError` for a name that is in no row; usually the first row has them all."""
    renaming = source.renaming
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
