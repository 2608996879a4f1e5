"""Labelled answers become pairs: an oracle that holds everything, and memory that does not."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.data.formats import unpaired
from tandem.data.formats.known_formats import FORMATS
from tandem.data.formats.unpaired import joined
from tandem.data.ledger import Ledger
from tandem.data.read_records import read_conversations, read_pairs
from tandem.data.records import Origin
from tandem.data.sources.chunks import Chunk, Row, RowChunk
from tandem.recipe.data_source import DataSource

Rows = list[dict[str, Any]]


def answer(prompt: Any, completion: Any, label: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def write(path: Path, rows: Rows) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path=str(path))


def naive(rows: Rows) -> tuple[list[tuple[str, str, int]], list[int]]:
    """Chosen, rejected and row of every pair, and the rows that stay alone."""
    waiting: dict[str, dict[bool, list[int]]] = {}
    pairs = []
    for number, row in enumerate(rows, start=1):
        own = waiting.setdefault(row["prompt"], {True: [], False: []})
        if own[not row["label"]]:
            other = rows[own[not row["label"]].pop(0) - 1]
            good, bad = (row, other) if row["label"] else (other, row)
            pairs.append((good["completion"], bad["completion"], number))
        else:
            own[row["label"]].append(number)
    alone = [n for own in waiting.values() for numbers in own.values() for n in numbers]
    return pairs, sorted(alone)


@pytest.mark.parametrize("in_memory", [2**26, 1])
def test_every_good_answer_meets_a_bad_one_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: int
) -> None:
    monkeypatch.setattr(unpaired, "_IN_MEMORY", in_memory)
    random_ = random.Random(3)
    rows = [
        answer(f"Q{random_.randrange(150)}", f"A{i}", random_.random() < 0.6) for i in range(1000)
    ]
    ledger = Ledger()
    found = list(read_pairs([write(tmp_path / "kto.jsonl", rows)], ledger))
    pairs, alone = naive(rows)
    assert [(one.chosen, one.rejected, one.origin.row) for one in found] == pairs
    assert [entry.row for entry in ledger.entries] == alone
    assert {entry.reason for entry in ledger.entries} <= {
        "no answer to the same prompt is labelled true",
        "no answer to the same prompt is labelled false",
    }
    assert len(rows) == 2 * len(pairs) + len(alone)


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_the_answer_may_be_the_last_turn_of_a_conversation(tmp_path: Path, key: str) -> None:
    def labelled(question: str, completion: str, label: Any) -> dict[str, Any]:
        turns = [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "P"},
            {"role": "assistant", "content": "B"},
            {"role": "user", "content": question},
            {"role": "assistant", "content": completion},
        ]
        return {key: turns, "label": label}

    rows = [
        labelled("Q", "good", True),
        labelled("other", "A", False),
        labelled("Q", "bad", False),
        labelled("same", "A", True),
        labelled("same", "A", False),
        {key: [], "label": True},
    ]
    source = write(tmp_path / "kto.jsonl", rows)
    ledger = Ledger()
    (pair,) = read_pairs([source], ledger)
    assert [turn.content for turn in pair.prompt] == ["S", "P", "B", "Q"]
    assert (pair.chosen, pair.rejected, pair.origin.row) == ("good", "bad", 3)
    assert {entry.row: entry.reason for entry in ledger.entries} == {
        2: "no answer to the same prompt is labelled true",
        5: "identical answers",
        6: f"`{key}` is not a list of a question and its answer",
    }
    good = list(read_conversations([source], Ledger()))
    assert [(one.origin.row, one.turns[-1].content) for one in good] == [(1, "good"), (4, "A")]
    # A class, not a verdict.
    classes = write(tmp_path / "classes.jsonl", [labelled("Q", "A", 0), labelled("Q", "B", 1)])
    assert len(list(read_conversations([classes], Ledger()))) == 2


@pytest.mark.parametrize(
    ("question", "completion", "label"),
    [
        ({"instruction": "Why", "input": "so?"}, "output", "label"),
        ({"instruction": "Why", "input": "so?", "history": [["P", "B"]]}, "output", "kto_tag"),
        ({"instruction": "Why", "context": "so?"}, "response", "label"),
        ({"prompt": "Why\n\nso?"}, "response", "label"),
        ({"query": "Why\n\nso?", "history": [["P", "B"]]}, "response", "label"),
        ({"question": "Why", "context": "so?"}, "answer", "label"),
    ],
)
def test_answers_of_any_format_may_be_labelled(
    tmp_path: Path, question: dict[str, Any], completion: str, label: str
) -> None:
    def row(answer: str | None, good: object) -> dict[str, Any]:
        return {**question, "system": "S", completion: answer, label: good, "id": 1}

    source = write(
        tmp_path / "kto.jsonl",
        [row("good", True), row("bad", "False"), row("alone", True), row(None, True)],
    )
    ledger = Ledger()
    (pair,) = read_pairs([source], ledger)
    before = ["S", "P", "B"] if "history" in question else ["S"]
    assert [turn.content for turn in pair.prompt] == [*before, "Why\n\nso?"]
    assert (pair.chosen, pair.rejected) == ("good", "bad")
    assert {entry.row: entry.reason for entry in ledger.entries} == {
        3: "no answer to the same prompt is labelled false",
        4: f"`{completion}` is null or missing",
    }
    good = list(read_conversations([source], Ledger()))
    assert [(one.origin.row, one.turns[-1].content) for one in good] == [(1, "good"), (3, "alone")]


@pytest.mark.parametrize("first", [{}, {"label": None}])
@pytest.mark.parametrize(
    "rest",
    [
        {"prompt": "Q", "completion": "A"},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"instruction": "Q", "output": "A"},
    ],
)
def test_a_verdict_that_the_first_row_lacks_is_not_overlooked(
    tmp_path: Path, first: dict[str, Any], rest: dict[str, Any]
) -> None:
    rows = [{**rest, **first}, {**rest, "label": False}, {**rest, "label": None}, rest]
    rows += [{**rest, "chosen": "C", "rejected": "R"}, {**rest, "chosen": "C", "rejected": None}]
    source = write(tmp_path / "late.jsonl", rows)
    if "prompt" in rest and "label" in first:
        # A label decides there, whatever it is.
        assert not list(read_conversations([source], Ledger()))
        return
    ledger = Ledger()
    assert [one.origin.row for one in read_conversations([source], ledger)] == [1, 3, 4, 6]
    assert {entry.row: entry.reason.partition(" (")[0] for entry in ledger.entries} == {
        2: "a row of another format than its source's first",
        5: "a row of another format than its source's first",
    }
    # What a recipe states is not doubted.
    (name,) = ledger.formats.values()
    stated = DataSource(path=source.path, format=name)
    assert len(list(read_conversations([stated], Ledger()))) == len(rows)


def test_rows_that_cannot_be_told_take_no_partner_with_them(tmp_path: Path) -> None:
    rows: Rows = [
        answer("Q", "good", True),
        answer("Q", "", False),
        answer("Q", None, False),
        answer("Q", "bad", "perhaps"),
        answer(None, "bad", False),
        answer("Q", "bad", False),
    ]
    ledger = Ledger()
    (pair,) = read_pairs([write(tmp_path / "kto.jsonl", rows)], ledger)
    assert (pair.chosen, pair.rejected, pair.origin.row) == ("good", "bad", 6)
    assert [(entry.row, entry.reason) for entry in ledger.entries] == [
        (2, "empty answer"),
        (3, "`completion` is null or missing"),
        (4, "`label` is neither true nor false"),
        (5, "`prompt` is null or missing"),
    ]
    assert ledger.formats == {str(tmp_path / "kto.jsonl"): "unpaired preference"}


def test_two_answers_that_make_no_pair_say_why(tmp_path: Path) -> None:
    rows = [answer("Q", "the same", True), answer("Q", "the same", False)]
    ledger = Ledger()
    assert list(read_pairs([write(tmp_path / "kto.jsonl", rows)], ledger)) == []
    assert [(entry.row, entry.reason) for entry in ledger.entries] == [(2, "identical answers")]


def test_messages_meet_by_what_was_said_before(tmp_path: Path) -> None:
    def turns(*said: str) -> Rows:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]

    rows = [
        answer(turns("Q", "A", "More?"), [{"role": "assistant", "content": "R"}], False),
        answer(turns("Q"), [{"role": "assistant", "content": "no"}], False),
        answer(turns("Q", "A", "More?"), [{"role": "assistant", "content": "C"}], True),
    ]
    ledger = Ledger()
    (pair,) = read_pairs([write(tmp_path / "kto.jsonl", rows)], ledger)
    assert (len(pair.prompt), pair.chosen, pair.rejected) == (3, "C", "R")
    assert [entry.row for entry in ledger.entries] == [2]


def test_sft_trains_on_the_good_ones(tmp_path: Path) -> None:
    rows = [answer("Q", "good", True), answer("Q", "bad", False)]
    ledger = Ledger()
    (found,) = read_conversations([write(tmp_path / "kto.jsonl", rows)], ledger)
    assert found.turns[-1].content == "good"
    (entry,) = ledger.entries
    assert (entry.row, entry.reason) == (2, "the answer is labelled false")


def test_pairs_across_files_keep_the_file_of_the_later_row(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [answer("Q", "bad", False), answer("P", "bad", False)])
    write(tmp_path / "b.jsonl", [answer("Q", "good", True)])
    ledger = Ledger()
    (pair,) = read_pairs([DataSource(path=str(tmp_path))], ledger)
    assert pair.origin == Origin(str(tmp_path / "b.jsonl"), 1)
    assert [(Path(entry.file).name, entry.row) for entry in ledger.entries] == [("a.jsonl", 2)]


def test_memory_holds_a_few_hundred_bytes_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpaired, "_IN_MEMORY", 1)
    count, size = 3_000, 2_000

    def chunks() -> Iterator[Chunk]:
        for number in range(2 * count):
            fields = answer(f"Q{number % count}", f"{number}" + "x" * size, number < count)
            yield RowChunk("made", 1, (Row(fields, Origin("made", number + 1)),))

    (known,) = (one for one in FORMATS if one.name == "unpaired preference" and one.joins)
    tracemalloc.start()
    try:
        pairs = sum(
            len(chunk.read) for chunk in joined(chunks(), known) if isinstance(chunk, RowChunk)
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pairs == count
    assert peak < count * 400
