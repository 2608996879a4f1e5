"""Words and what sets share, against slow and obvious versions of themselves."""

from __future__ import annotations

import bz2
import gzip
import json
import random
from functools import partial
from pathlib import Path

import pyarrow
import pytest

from tandem.data.formats.format import texts_in
from tandem.data.records import Origin
from tandem.data.text import contamination
from tandem.data.text.contamination import Other, read_other
from tandem.data.text.word_hashes import MOST_CHARACTERS, hash_words
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

from ..check.made_data import sentences, write
from .plain_words import plain_words


def holding(*texts: str, run: int = 13, form: int | None = None) -> Other:
    """A set of one row a text."""
    other = Other("set", run=run, form=form)
    for number, text in enumerate(texts, start=1):
        other.add([text], Origin("set", number))
    return other


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
    "\u4e16\u754c\u3002\u4f60\u597d\u3001\u300c\u5b57\u300d",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 thai \u0e14\u0e35",
    "no\u00a0break \u00abquoted\u00bb \u00bfwhy\u00b7not?",
    "\n\nlines\nof\r\ntext\ttabs\n",
]


def holds(other: Other, text: str) -> bool:
    """Asked alone, and among others."""
    (alone,) = other.held([text])
    among = other.held(["", "x y z", text, "!?"]).tolist()
    assert among == [False, False, alone, False]
    return bool(alone)


def test_words_are_those_of_a_plain_reading() -> None:
    words = hash_words(TEXTS)
    seen: dict[int, str] = {}
    for number, text in enumerate(TEXTS):
        own = words.hashes[words.starts[number] : words.starts[number + 1]].tolist()
        expected = plain_words(text)
        assert len(own) == len(expected), text
        for value, word in zip(own, expected, strict=True):
            assert seen.setdefault(value, word) == word
    # Different words have different numbers.
    assert len(set(seen.values())) == len(seen)


def test_where_a_text_stands_changes_nothing() -> None:
    alone = [hash_words([text]).hashes.tolist() for text in TEXTS]
    together = hash_words(TEXTS)
    for number, own in enumerate(alone):
        assert (
            together.hashes[together.starts[number] : together.starts[number + 1]].tolist() == own
        )


def test_runs_stay_within_a_text() -> None:
    words = hash_words(["a b c d", "e f", "", "g h i"])
    runs, text_of = words.runs(3)
    assert text_of.tolist() == [0, 0, 3]
    assert runs[2] == hash_words(["g h i"]).runs(3)[0][0]
    assert len(set(runs.tolist())) == 3
    assert len(words.runs(20)[0]) == 0


def test_only_the_beginning_of_an_endless_text_is_read() -> None:
    words = hash_words(["ab " * MOST_CHARACTERS, "x"])
    assert words.starts.tolist()[1] == -(-MOST_CHARACTERS // 3)
    assert words.starts[2] - words.starts[1] == 1


def test_whole_texts_have_the_hash_of_their_run() -> None:
    words = hash_words(["a b c d", "e f", "", "g h i", "a b c d e"])
    wholes, texts = words.wholes(3, 5)
    assert texts.tolist() == [0, 3]
    assert wholes.tolist() == [
        *hash_words(["a b c d"]).runs(4)[0],
        *hash_words(["g h i"]).runs(3)[0],
    ]
    assert words.wholes(5, 5)[1].tolist() == []


@pytest.mark.parametrize("most", [2**24, 40])
def test_shared_words_are_those_of_a_plain_search(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a set too large to keep whole, long overlaps are still found."""
    monkeypatch.setattr(contamination, "_MOST_RUNS", most)
    rng = random.Random(2)
    theirs = [sentences(rng, 8) for _ in range(20)]
    form = "This is the question that has the same form in every row of the set: "
    rows = [{"q": f"{form} number{n} {text}", "n": 1} for n, text in enumerate(theirs)]
    path = write(tmp_path / "eval.jsonl", rows)
    other = read_other(DataSource(path=str(path)))
    assert (other.sampled > 1) == (most == 40)
    ours = [f"{form} mine{n} {sentences(rng, 3)}" for n in range(10)]
    ours += [f"{sentences(rng, 1)} {theirs[i]} {sentences(rng, 1)}" for i in (3, 11)]
    found = other.shared(hash_words(ours))
    assert [(number, origin.row) for number, origin in found] == [(10, 4), (11, 12)]


def test_files_of_any_layout_can_be_compared_with(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog while seven cats look on quietly"
    zstd = partial(pyarrow.compress, codec="zstd", asbytes=True)
    files = {
        "a.csv": f'id,question\n1,"other"\n\n2,"{text}"\n'.encode(),
        "a.tsv": f"id\tquestion\n1\tother\n2\t{text}\n".encode(),
        "a.txt": f"first\n{text}\n".encode(),
        "a.txt.bz2": bz2.compress(f"first\n{text}\n".encode()),
        "a.csv.gz": gzip.compress(f"id,q\n1,other\n2,{text}\n".encode()),
        "a.csv.zst": zstd(f"id,q\n1,other\n2,{text}\n".encode()),
        "a.csv.bz2": bz2.compress(f"id,q\n1,other\n2,{text}\n".encode()),
        "a.txt.zst": zstd(f"first\n{text}\n".encode()),
        "plain": f"first\n{text}\n".encode(),
        "a.json": f'[{{"x": 1}}, {{"deep": [{{"er": "{text}"}}]}}]'.encode(),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        other = read_other(DataSource(path=str(path)))
        ((_, origin),) = other.shared(hash_words([f"Well, {text.upper()}!"]))
        assert (origin.file, origin.row) == (str(path), 2), name
        assert other.rows == 2, name


def test_rows_of_a_table_are_those_under_its_header(tmp_path: Path) -> None:
    """One without a header has a row in its place, which is compared as well."""
    texts = [" ".join(f"{name}{i}" for i in range(20)) for name in "abc"]
    path = tmp_path / "a.csv"
    path.write_text("".join(f"{text},A\n" for text in texts))
    other = read_other(DataSource(path=str(path)))
    assert other.rows == 2
    assert [(n, origin.row) for n, origin in other.shared(hash_words(texts))] == [
        (0, 1), (1, 1), (2, 2),
    ]  # fmt: skip


def _damaged(content: bytes) -> bytes:
    """Compressed data with a byte of its first block turned, which no length or sum tells."""
    return content[:10] + bytes([content[10] ^ 0xFF]) + content[11:]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "there is no text in"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt.gz", _damaged(gzip.compress(b"some words " * 99)), "cannot be read"),
        ("a.csv.zst", b"not zstd", "cannot be read"),
        ("a.csv", b"id,question\n", "there is no text in"),
        ("a.jsonl", b"", "there is no text in"),
    ],
)
def test_a_set_that_cannot_be_read_is_an_error(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_other(DataSource(path=str(tmp_path / name)))


def test_texts_that_share_so_many_words_in_a_row_are_held() -> None:
    words = [f"w{i}" for i in range(40)]
    known = holding(" ".join(words[:20]), "which way is up", "yes")
    assert holds(known, "So: " + " ".join(words[7:20]).upper().replace(" ", ", "))
    assert not holds(known, " ".join(words[8:20]) + " other")
    assert holds(known, "Which way is up?")
    assert not holds(known, "tell me which way is up")
    assert not holds(known, "yes")
    short = holding(" ".join(words[:20]), run=4)
    assert holds(short, " ".join(["so", *words[3:7]]))
    assert not holds(short, " ".join(["so", *words[3:6]]))
    assert not holds(holding(), "anything that is said in many words of one kind or of another")


def test_writing_without_spaces_is_held() -> None:
    for text in (
        "\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341\u767e\u5343\u4e07\u5104\u5146",
        "".join(map(chr, range(0x0E01, 0x0E10))),
    ):
        known = holding(text, "\u4f60\u597d\u4e16\u754c")
        assert holds(known, f"so: {text[:6]}\u3002 {text[6:]}")
        assert not holds(known, text[:12])
        ((number, origin),) = known.shared(hash_words(["other", f"so {text}"]))
        assert (number, origin.row) == (1, 1)
        assert holds(known, "\u4f60\u597d\u3001\u4e16\u754c!")


def test_what_is_shared_may_lie_anywhere_in_a_long_text() -> None:
    rng = random.Random(3)
    words = [f"{rng.randrange(10**8)}" for _ in range(9000)]
    text = " ".join(words)
    assert len(text) > 3 * MOST_CHARACTERS
    known = holding(text)
    for at in range(0, 8900, 13):
        assert holds(known, " ".join(words[at : at + 13]))
    known = holding(part := " ".join(words[:13]))
    for before in range(MOST_CHARACTERS - 250, MOST_CHARACTERS + 10, 7):
        assert holds(known, "x" * before + f" {part} " + "y " * 10_000)


def test_a_passage_of_many_rows_is_form_or_is_not() -> None:
    passage = "the passage that a dozen of questions are about and that is told with each of them"
    rows = [f"{passage} question number {i}" for i in range(12)]
    assert holds(holding(*rows), passage)
    assert not holds(holding(*rows, form=10), passage)
    assert holds(holding(*rows[:10], form=10), passage)


def test_real_evaluation_questions_are_found(shared_data: Path) -> None:
    with (shared_data / "evaluation" / "gsm8k_test.jsonl").open() as file:
        questions = [json.loads(line) for line, _ in zip(file, range(200), strict=False)]
    known = holding(*(text for q in questions for text in texts_in(q)))
    assert all(holds(known, f"Solve this. {q['question']} Think.") for q in questions)
    with (shared_data / "pairs" / "orca_dpo_pairs.jsonl").open() as file:
        assert not any(holds(known, json.loads(line)["question"]) for line in file)
