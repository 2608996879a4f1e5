"""Questions to a tokenizer's vocabulary: added tokens, tokens without a row, the longest token."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
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
        return bool(self.new or self.known)


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> AddedTokens:
    """Add special tokens to a tokenizer; return the new ones and those it knew before.

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
        added = [AddedToken(token, normalized=False, special=True) for token in new]
        tokenizer.add_tokens(added, special_tokens=True)
    return AddedTokens(
        {token: int(tokenizer.convert_tokens_to_ids(token)) for token in new},
        {token: int(known[token]) for token in dict.fromkeys(tokens) if token in known},
    )


_ALL = 2**31  # more rows than any model has


class NoRow(UserError):  # noqa: N818 - named as Stopped is
    """A text has a token for which the model has no row."""


def tokens_without_row(tokenizer: Any, rows: int) -> dict[str, int]:
    """Return the tokens, by id, that a tokenizer has beyond a model's rows."""
    beyond = [(index, token) for token, index in tokenizer.get_vocab().items() if index >= rows]
    return {token: index for index, token in sorted(beyond)}


def row_notices(tokenizer: Any, rows: int) -> tuple[str, ...]:
    """Return a line on a tokenizer with more tokens than the model has rows, if it has."""
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


def require_known(ids: Iterable[int], rows: int | None, known: Set[int]) -> int | None:
    """Return the first id that is not `known` to the tokenizer, None where all are.

    Raises `NoRow` for one beyond the `rows` of a model's embedding; None: those are unknown.
    """
    strange = next((index for index in ids if index not in known or index >= (rows or _ALL)), None)
    if strange is not None and rows is not None and strange >= rows:
        raise NoRow(
            f"the id {strange} is none of the model's, which has {rows} rows in its embedding, the "
            f"last for id {rows - 1}. Make the tokens with the model's own tokenizer."
        )
    return strange


# Unicode's NFC composes at most three bytes into one (Hangul: nine into three; the Kelvin sign:
# three into one); one to spare.
_NFC = 4
_KEEPING = {"ByteLevel", "Metaspace", "Split", "Digits", "Punctuation"}


def longest_token(tokenizer: Any) -> int:
    """Return the most bytes of a text that one token of a `tokenizers` tokenizer can stand for.

    0 when unknown: where parts of a text may vanish (normalisers that strip or map, blanks that are
    split off, unknown words that become one token).
    """
    parts = json.loads(tokenizer.to_str())
    model = parts["model"]
    vocabulary = model.get("vocab")
    if model.get("type") != "BPE" or not isinstance(vocabulary, dict):
        return 0
    shrinks = math.prod(map(_shrinks, _flat(parts["normalizer"], "normalizers")))
    splitters = _flat(parts["pre_tokenizer"], "pretokenizers")
    keeps = all(
        part["type"] in _KEEPING and part.get("behavior") != "Removed" for part in splitters
    )
    added = parts["added_tokens"]
    if not keeps or any(token["lstrip"] or token["rstrip"] for token in added):
        return 0
    if not shrinks or not _covers_bytes(model, splitters):
        return 0
    entries = [*vocabulary, *(token["content"] for token in added)]
    return shrinks * max(len(entry.encode("utf-8")) for entry in entries)


def _flat(part: Any, key: str) -> list[Any]:
    """Return the parts of a normaliser or pre-tokenizer, which may be nested sequences."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [inner for one in part[key] for inner in _flat(one, key)]


def _shrinks(normaliser: Any) -> int:
    """Return how many times shorter a normaliser may make a text; 0 when unknown."""
    kind = normaliser["type"]
    if kind == "NFC":
        return _NFC
    if kind == "Replace":
        old = normaliser["pattern"].get("String")
        longer = old is not None and len(normaliser["content"].encode()) >= len(old.encode())
        return 1 if longer else 0
    return 1 if kind == "Prepend" else 0


def _covers_bytes(model: Any, splitters: Sequence[Any]) -> bool:
    """Return whether any text can be spelled, so that none of it is unknown."""
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    from tokenizers.pre_tokenizers import ByteLevel

    byte_level = any(part["type"] == "ByteLevel" for part in splitters)
    return byte_level and all(letter in model["vocab"] for letter in ByteLevel.alphabet())
