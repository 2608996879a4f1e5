"""Texts as words: how alike two are, and what an evaluation set has in common with a prompt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

# Scripts that put no spaces between words are taken character by character.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
# Shorter texts, such as the choices of a question, are no sign of anything.
_FEWEST = 4


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


class Contamination:
    """Texts of evaluation sets, to find prompts that contain a part of one.

    Args:
        texts: every text of the sets.
        size: so many words in a row are a part; a text of fewer words (but at least four) is
            found when it is the whole of a prompt or an answer.
    """

    def __init__(self, texts: Iterable[str], size: int) -> None:
        self._size = size
        self._parts: set[int] = set()
        self._whole: set[int] = set()
        for text in texts:
            words = words_of(text)
            if len(words) >= size:
                self._parts.update(map(hash, _runs(words, size)))
            elif len(words) >= _FEWEST:
                self._whole.add(hash(tuple(words)))

    def found_in(self, text: str) -> bool:
        """Whether a text shares a part with the sets, or is one of their short texts."""
        words = words_of(text)
        if hash(tuple(words)) in self._whole:
            return True
        return any(hash(run) in self._parts for run in _runs(words, self._size))


def _runs(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + size]) for i in range(len(words) - size + 1))
