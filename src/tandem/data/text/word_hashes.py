"""Words as 64-bit hashes, computed for many texts at once; duplicates and overlaps use them.

A word is a run of letters and digits in lower case; in writing without spaces between words
(Chinese, Japanese, Thai), each character is a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

# Characters of a text that are hashed; of a record of many megabytes only the beginning counts.
MOST_CHARACTERS = 20_000
# Odd, so that it has an inverse modulo 2**64, where all of this is computed.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
_STEP = np.uint64(0x94D049BB133111EB)
_SHIFT = np.uint64(29)


@dataclass(frozen=True, slots=True)
class Words:
    """The words of n texts: `hashes` [w], and `starts` [n + 1], where each text's begin."""

    hashes: Hashes
    starts: NDArray[np.int64]

    def runs(self, length: int) -> tuple[Hashes, NDArray[np.int64]]:
        """Return hashes of all runs of `length` words within a text, and the text of each."""
        count = len(self.hashes) - length + 1
        if count <= 0:
            return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
        runs = np.zeros(count, dtype=np.uint64)
        for offset in range(length):
            runs = _mixed(runs * _STEP + self.hashes[offset : offset + count])
        text_of = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        within = text_of[:count] == text_of[length - 1 :]
        return runs[within], text_of[:count][within]

    def wholes(self, least: int, below: int) -> tuple[Hashes, NDArray[np.int64]]:
        """Return the hashes and numbers of the texts of `least` to `below` - 1 words.

        The hash of a text of n words is that of its run of n.
        """
        counts = np.diff(self.starts)
        texts = np.flatnonzero((counts >= least) & (counts < below))
        wholes = np.zeros(len(texts), dtype=np.uint64)
        for offset in range(below - 1):
            more = counts[texts] > offset
            word = self.hashes[self.starts[texts[more]] + offset]
            wholes[more] = _mixed(wholes[more] * _STEP + word)
        return wholes, texts


def hash_words(texts: Sequence[str]) -> Words:
    """Return the words of some texts, each of at most `MOST_CHARACTERS`."""
    # Readers refuse a lone half of a surrogate pair; other files may have one.
    parts = [text[:MOST_CHARACTERS].lower().encode("utf-8", "replace") for text in texts]
    if not parts:
        return Words(np.zeros(0, dtype=np.uint64), np.zeros(1, dtype=np.int64))
    ends = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64)
    content = np.frombuffer(b"\n".join([*parts, b""]), dtype=np.uint8)
    inside, begins = _shape(content)
    first = np.flatnonzero(inside & begins)
    # A word ends where the next one begins, or at the first byte that is in none.
    stops = np.flatnonzero(inside & np.append(~inside[1:] | begins[1:], True)) + 1
    sums, inverse = _sums(content)
    hashes = _mixed((sums[stops] - sums[first]) * inverse[first])
    starts = np.searchsorted(first, np.concatenate([[0], ends]))
    return Words(hashes, starts.astype(np.int64))


def _shape(content: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which bytes are within words, and which would begin one."""
    inside = _IN_WORD[content]
    lead, next_ = content[:-1], content[1:]
    # In UTF-8, general punctuation (dashes, curly quotes) is E2 80 xx, that of Chinese and Japanese
    # E3 80 xx, and C2 xx what Latin-1 has of marks and spaces.
    marks = np.flatnonzero(((lead == 0xE2) | (lead == 0xE3)) & (next_ == 0x80))
    for offset in range(3):
        inside[marks + offset] = False
    latin = np.flatnonzero(lead == 0xC2)
    inside[latin] = inside[latin + 1] = False
    own = _OWN_WORD[content]
    own[:-1] |= (lead == 0xE0) & ((next_ == 0xB8) | (next_ == 0xB9))  # Thai
    begins = own.copy()
    begins[0] = True
    begins[1:] |= ~inside[:-1]
    # A word begins behind a character that is a word of its own, which has three bytes.
    after = np.flatnonzero(own) + 3
    begins[after[after < len(content)]] = True
    return inside, begins


def _sums(content: NDArray[np.uint8]) -> tuple[Hashes, Hashes]:
    """Return [b + 1] sums of byte x base**position, and [b] inverses of base**position."""
    powers = _powers(_BASE, len(content))
    sums = np.zeros(len(content) + 1, dtype=np.uint64)
    # Plus one, so that a zero byte counts.
    np.cumsum((content.astype(np.uint64) + np.uint64(1)) * powers, out=sums[1:])
    return sums, _powers(_INVERSE, len(content))


def _powers(base: int, count: int) -> Hashes:
    known = _POWERS.get(base)
    if known is None or len(known) < count:
        factors = np.full(max(count, 2**16), base, dtype=np.uint64)
        factors[0] = 1
        known = _POWERS[base] = np.cumprod(factors, dtype=np.uint64)
    return known[:count]


def _mixed(values: Hashes) -> Hashes:
    values = (values ^ (values >> _SHIFT)) * _MIX
    mixed: Hashes = values ^ (values >> _SHIFT)
    return mixed


def _table(values: Sequence[int]) -> NDArray[np.bool_]:
    table = np.zeros(256, dtype=np.bool_)
    table[list(values)] = True
    return table


_IN_WORD = _table([*b"0123456789abcdefghijklmnopqrstuvwxyz", *range(0x80, 0x100)])
# First bytes of the characters from U+3000 to U+9FFF.
_OWN_WORD = _table(range(0xE3, 0xEA))
_POWERS: dict[int, Hashes] = {}
