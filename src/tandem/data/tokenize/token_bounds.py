"""How few tokens a long text can have, without tokenising it.

A text of C characters has at least C bytes, and no token stands for more bytes than the longest
vocabulary entry has. That holds where every byte of a text ends up in a token, and only
tokenizers for which that is sure have a bound.
"""

from __future__ import annotations

import json
from typing import Any

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
