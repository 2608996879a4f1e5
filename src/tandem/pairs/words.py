"""Texts as words: how alike two are."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

# Scripts that put no spaces between words are taken character by character.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def similarity(one: str, other: str) -> float:
    """How alike two texts are, 0 to 1: the share of neighbouring word pairs they have in common.

    That is the Dice coefficient of their multisets of pairs of neighbouring words, case and
    punctuation aside; of single words where one text has fewer than two. Two texts without any
    word are alike when they are equal.
    """
    a, b = words_of(one), words_of(other)
    if not a or not b:
        return float(one.split() == other.split())
    if min(len(a), len(b)) > 1:
        a, b = (list(map(" ".join, pairwise(x))) for x in (a, b))
    common = (Counter(a) & Counter(b)).total()
    return 2 * common / (len(a) + len(b))
