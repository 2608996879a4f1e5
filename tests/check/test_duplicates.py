"""Near duplicates against slow and obvious versions of themselves."""

from __future__ import annotations

import random

import numpy as np

from tandem.check.duplicates import NEAR, exact_twins, near_twins, signatures
from tandem.data.text.word_hashes import hash_words

from ..data.plain_words import plain_words
from .made_data import sentences

_NONE = np.zeros(0, dtype=np.int64)


def _jaccard(a: str, b: str) -> float:
    runs = []
    for text in (a, b):
        words = plain_words(text)
        runs.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_near_duplicates_are_those_of_a_plain_comparison() -> None:
    """All that are alike beyond doubt, and none that clearly is not."""
    rng = random.Random(1)
    texts = []
    for _ in range(20):
        text = sentences(rng, 12)
        texts.append(text)
        for changes in (1, 3, 8, 30):
            words = text.split()
            for at in rng.sample(range(len(words)), changes):
                words[at] = f"changed{rng.randrange(10**6)}"
            texts.append(" ".join(words))
    twins = near_twins(signatures(hash_words(texts)), _NONE)
    found = dict(zip(twins.later.tolist(), twins.earlier.tolist(), strict=True))
    for later in range(len(texts)):
        closest = max((_jaccard(texts[later], texts[e]) for e in range(later)), default=0.0)
        if closest > NEAR + 0.12:
            assert later in found
        if later in found:
            assert found[later] < later
            assert _jaccard(texts[later], texts[found[later]]) > NEAR - 0.2
    assert len(found) >= 20


def test_short_texts_are_compared_as_a_whole() -> None:
    texts = ["yes", "no", "yes", "yes please", "", "", "yes, please!"]
    twins = near_twins(signatures(hash_words(texts)), _NONE)
    assert (twins.later.tolist(), twins.earlier.tolist()) == ([2, 6], [0, 3])
    assert near_twins(signatures(hash_words(["", "?"])), _NONE).later.tolist() == []


def test_skipped_records_are_nobodys_twins() -> None:
    found = signatures(hash_words(["one two three four"] * 3))
    twins = near_twins(found, np.array([0]))
    assert (twins.later.tolist(), twins.earlier.tolist()) == ([2], [1])


def test_exact_twins_name_the_first() -> None:
    twins = exact_twins(np.array([5, 7, 5, 0, 0, 7, 5], dtype=np.uint64))
    assert twins.later.tolist() == [2, 5, 6]
    assert twins.earlier.tolist() == [0, 1, 0]
