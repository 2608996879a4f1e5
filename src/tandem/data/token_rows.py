"""Token ids beyond the rows of a model's embedding: found before anything is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tandem.errors import UserError


class NoRow(UserError):  # noqa: N818 - named as Stopped is
    """A text has a token for which the model has no row."""


def tokens_without_row(tokenizer: Any, rows: int) -> dict[str, int]:
    """The tokens that a tokenizer has beyond a model's rows, by id."""
    beyond = [(index, token) for token, index in tokenizer.get_vocab().items() if index >= rows]
    return {token: index for index, token in sorted(beyond)}


def row_notices(tokenizer: Any, rows: int) -> tuple[str, ...]:
    """A line on a tokenizer with more tokens than the model has rows, if it has."""
    beyond = tokens_without_row(tokenizer, rows)
    if not beyond:
        return ()
    some = ", ".join(f"{token!r} ({index})" for token, index in list(beyond.items())[:3])
    return (
        f"the tokenizer has {len(beyond)} more tokens than the model has rows for, {rows}: {some}"
        f"{', ...' if len(beyond) > 3 else ''}; a record that has one of them stops the run",
    )


def require_rows(ids: Iterable[int], rows: int | None, decode: Callable[[list[int]], str]) -> None:
    """Raise `NoRow` for a token id beyond a model's embedding.

    Args:
        ids: of a text.
        rows: of the embedding; None: every token has one.
        decode: ids to text.
    """
    beyond = None if rows is None else next((index for index in ids if index >= rows), None)
    if beyond is not None:
        token = decode([beyond])
        raise NoRow(
            f"the token {token!r} has the id {beyond}, and the model has {rows} rows in its "
            f"embedding, the last for id {(rows or 0) - 1}. Name it in `added_tokens`, "
            "which adds a row and trains it, or put the tokenizer that belongs to the model into "
            "its folder."
        )
