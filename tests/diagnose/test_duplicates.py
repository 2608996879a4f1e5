"""Words, near duplicates and overlaps against slow and obvious versions of themselves."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest

from tandem.data.sources import SourceSpec
from tandem.diagnose import overlap
from tandem.diagnose.duplicates import NEAR, exact_twins, near_twins, signatures
from tandem.diagnose.overlap import read_other
from tandem.diagnose.words import MOST_CHARACTERS, words_of
from tandem.errors import UserError

from .made_data import sentences, write

_NONE = np.zeros(0, dtype=np.int64)


def _plain_words(text: str) -> list[str]:
    """What `words_of` is to see in texts of these tests."""
    spaced = re.sub(r"([\u3040-\u9fff])", r" \1 ", text.lower())
    return re.findall(r"[0-9a-z\u00c0-\u024f\u0400-\u04ff\u3040-\u9fff]+", spaced)


TEXTS = [
    "",
    "One",
    "One, two; THREE - four... five!",
    "don\u2019t \u201cquote\u201d \u2014 dashes\u2026",
    'don\'t "quote" - dashes...',
    "naïve Übermut ÉCOLE 42nd",
    "世界你好 hello 世界",
    "日本語のテスト",
    "привет мир",
    "?!",
    "\n\nlines\nof\r\ntext\ttabs\n",
]


def test_words_are_those_of_a_plain_reading() -> None:
    words = words_of(TEXTS)
    seen: dict[int, str] = {}
    for number, text in enumerate(TEXTS):
        own = words.hashes[words.starts[number] : words.starts[number + 1]].tolist()
        expected = _plain_words(text)
        assert len(own) == len(expected), text
        for value, word in zip(own, expected, strict=True):
            assert seen.setdefault(value, word) == word
    # Different words have different numbers.
    assert len(set(seen.values())) == len(seen)


def test_where_a_text_stands_changes_nothing() -> None:
    alone = [words_of([text]).hashes.tolist() for text in TEXTS]
    together = words_of(TEXTS)
    for number, own in enumerate(alone):
        assert (
            together.hashes[together.starts[number] : together.starts[number + 1]].tolist() == own
        )


def test_runs_stay_within_a_text() -> None:
    words = words_of(["a b c d", "e f", "", "g h i"])
    runs, text_of = words.runs(3)
    assert text_of.tolist() == [0, 0, 3]
    assert runs[2] == words_of(["g h i"]).runs(3)[0][0]
    assert len(set(runs.tolist())) == 3
    assert len(words.runs(20)[0]) == 0


def test_only_the_beginning_of_an_endless_text_is_read() -> None:
    words = words_of(["ab " * MOST_CHARACTERS, "x"])
    assert words.starts.tolist()[1] == -(-MOST_CHARACTERS // 3)
    assert words.starts[2] - words.starts[1] == 1


def _jaccard(a: str, b: str) -> float:
    runs = []
    for text in (a, b):
        words = _plain_words(text)
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
    twins = near_twins(signatures(words_of(texts)), _NONE)
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
    twins = near_twins(signatures(words_of(texts)), _NONE)
    assert (twins.later.tolist(), twins.earlier.tolist()) == ([2, 6], [0, 3])
    assert near_twins(signatures(words_of(["", "?"])), _NONE).later.tolist() == []


def test_skipped_records_are_nobodys_twins() -> None:
    found = signatures(words_of(["one two three four"] * 3))
    twins = near_twins(found, np.array([0]))
    assert (twins.later.tolist(), twins.earlier.tolist()) == ([2], [1])


def test_exact_twins_name_the_first() -> None:
    twins = exact_twins(np.array([5, 7, 5, 0, 0, 7, 5], dtype=np.uint64))
    assert twins.later.tolist() == [2, 5, 6]
    assert twins.earlier.tolist() == [0, 1, 0]


@pytest.mark.parametrize("most", [2**24, 40])
def test_shared_words_are_those_of_a_plain_search(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a set too large to keep whole, long overlaps are still found."""
    monkeypatch.setattr(overlap, "_MOST_RUNS", most)
    rng = random.Random(2)
    theirs = [sentences(rng, 8) for _ in range(20)]
    form = "This is the question that has the same form in every row of the set: "
    rows = [{"q": f"{form} number{n} {text}", "n": 1} for n, text in enumerate(theirs)]
    path = write(tmp_path / "eval.jsonl", rows)
    other = read_other(SourceSpec(str(path)))
    assert (other.sampled > 1) == (most == 40)
    ours = [f"{form} mine{n} {sentences(rng, 3)}" for n in range(10)]
    ours += [f"{sentences(rng, 1)} {theirs[i]} {sentences(rng, 1)}" for i in (3, 11)]
    found = other.shared(words_of(ours))
    assert [(number, origin.row) for number, origin in found] == [(10, 4), (11, 12)]


def test_files_of_any_layout_can_be_compared_with(tmp_path: Path) -> None:
    import bz2
    import gzip

    text = "the quick brown fox jumps over the lazy dog while seven cats look on quietly"
    files = {
        "a.csv": f'id,question\n1,"{text}"\n'.encode(),
        "a.tsv": f"id\tquestion\n1\t{text}\n".encode(),
        "a.txt": f"first\n{text}\n".encode(),
        "a.txt.bz2": bz2.compress(f"first\n{text}\n".encode()),
        "a.csv.gz": gzip.compress(f"id,q\n1,{text}\n".encode()),
        "plain": f"first\n{text}\n".encode(),
        "a.json": f'[{{"x": 1}}, {{"deep": [{{"er": "{text}"}}]}}]'.encode(),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        other = read_other(SourceSpec(str(path)))
        ((_, origin),) = other.shared(words_of([f"Well, {text.upper()}!"]))
        assert (origin.file, origin.row) == (str(path), 2), name


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "there is no text in"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.jsonl", b"", "there is no text in"),
    ],
)
def test_a_set_that_cannot_be_read_is_an_error(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_other(SourceSpec(str(tmp_path / name)))
