"""What a tokenizer's vocabulary says: added tokens, tokens without a row, the longest token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem.errors import UserError


@dataclass(frozen=True)
class AddedTokens:
    """Tokens whose embeddings are trained, by id: `new` to the tokenizer, or `known` before."""

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
    """Raise `NoRow` for a token id beyond the `rows` of a model's embedding; None: all have one."""
    beyond = None if rows is None else next((index for index in ids if index >= rows), None)
    if beyond is not None:
        token = decode([beyond])
        raise NoRow(
            f"the token {token!r} has the id {beyond}, and the model has {rows} rows in its "
            f"embedding, the last for id {(rows or 0) - 1}. Name it in `added_tokens`, "
            "which adds a row and trains it, or put the tokenizer that belongs to the model into "
            "its folder."
        )


# Unicode's NFC composes at most three bytes into one (Hangul: nine into three; the Kelvin sign:
# three into one); one to spare.
_NFC = 4
_KEEPING = {"ByteLevel", "Metaspace", "Split", "Digits", "Punctuation"}


def longest_token(tokenizer: Any) -> int:
    """The most bytes of a text that one token of a `tokenizers` tokenizer can stand for.

    0 when nobody knows: where parts of a text may vanish (normalisers that strip or map, blanks
    that are split off, unknown words that become one token).
    """
    parts = json.loads(tokenizer.to_str())
    model = parts["model"]
    vocabulary = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocabulary, dict):
        return 0
    shrinks = _normaliser(parts["normalizer"])
    added = parts["added_tokens"]
    if not shrinks or not _keeps(parts["pre_tokenizer"]):
        return 0
    if any(token["lstrip"] or token["rstrip"] for token in added):
        return 0
    if not _covers_bytes(parts, vocabulary):
        return 0
    entries = [*vocabulary, *(token["content"] for token in added)]
    return shrinks * max(len(entry.encode("utf-8")) for entry in entries)


def _normaliser(normaliser: Any) -> int:
    """How many times shorter a text may become, 0 when nobody knows."""
    if normaliser is None:
        return 1
    kind = normaliser["type"]
    if kind == "Sequence":
        factor = 1
        for part in normaliser["normalizers"]:
            factor *= _normaliser(part)
        return factor
    if kind == "NFC":
        return _NFC
    if kind == "Replace":
        old = normaliser["pattern"].get("String")
        longer = old is not None and len(normaliser["content"].encode()) >= len(old.encode())
        return 1 if longer else 0
    return 1 if kind == "Prepend" else 0


def _keeps(splitter: Any) -> bool:
    """Whether a pre-tokenizer leaves nothing out."""
    if splitter is None:
        return True
    if splitter["type"] == "Sequence":
        return all(_keeps(part) for part in splitter["pretokenizers"])
    return splitter["type"] in _KEEPING and splitter.get("behavior") != "Removed"


def _covers_bytes(parts: Any, vocabulary: dict[str, int]) -> bool:
    """Whether any text can be spelled, so that none of it is unknown."""
    if parts["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    from tokenizers.pre_tokenizers import ByteLevel

    return _byte_level(parts["pre_tokenizer"]) and all(
        letter in vocabulary for letter in ByteLevel.alphabet()
    )


def _byte_level(splitter: Any) -> bool:
    if splitter is None:
        return False
    if splitter["type"] == "Sequence":
        return any(_byte_level(part) for part in splitter["pretokenizers"])
    return bool(splitter["type"] == "ByteLevel")
