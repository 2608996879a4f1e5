"""Tokens whose embeddings a run trains: new ones of the tokenizer, and ones that it had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem.errors import UserError


@dataclass(frozen=True)
class AddedTokens:
    """Tokens whose embeddings are trained, with their ids.

    Attributes:
        new: those that the tokenizer lacked.
        known: those that it had.
    """

    new: Mapping[str, int] = field(default_factory=dict)
    known: Mapping[str, int] = field(default_factory=dict)

    @property
    def ids(self) -> tuple[int, ...]:
        """All of their ids, ascending."""
        return tuple(sorted({*self.new.values(), *self.known.values()}))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.new or self.known)


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> AddedTokens:
    """Add special tokens to a tokenizer; returns all of them, those it had already apart.

    New ones are taken out of a text as they stand, wherever they are written.

    Raises `UserError` for an empty token and for one that begins or ends with a blank.
    """
    from tokenizers import AddedToken

    for token in tokens:
        if not token or token != token.strip():
            raise UserError(
                f"added_tokens: {token!r} is empty or has a blank at its edge; write the token as "
                "the template does, without blanks around it"
            )
    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    if new:
        tokenizer.add_tokens(
            [AddedToken(token, normalized=False, special=True) for token in new],
            special_tokens=True,
        )
    had = [token for token in dict.fromkeys(tokens) if token in known]
    return AddedTokens(
        {token: int(tokenizer.convert_tokens_to_ids(token)) for token in new},
        {token: int(known[token]) for token in had},
    )
