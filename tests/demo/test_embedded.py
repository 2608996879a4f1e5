"""The names `demo:...`: disjoint splits, the same data for a seed, readable by the stages."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tandem.data.formats.conversations import read_question
from tandem.data.ledger import Ledger
from tandem.data.read_records import read_conversations
from tandem.data.records import Origin
from tandem.demo.corpus import documents
from tandem.demo.embedded import materialise, split_facts
from tandem.demo.facts import Fact, all_facts
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

NAMES = ("demo:instructions", "demo:prompts", "demo:questions")


def _rows(name: str, folder: Path, seed: int) -> list[dict[str, Any]]:
    text = materialise(name, folder, seed).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("seed", [1, 2, 42])
def test_the_parts_share_no_fact_and_leave_none_out(seed: int) -> None:
    split = split_facts(seed)
    parts = [{fact.key for fact in part} for part in (split.taught, split.compared, split.held_out)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(all_facts())
    assert len(parts[2]) >= 100
    relations = {fact.relation for fact in all_facts()}
    assert {fact.relation for fact in split.taught} == relations
    assert {fact.relation for fact in split.held_out} == relations


@pytest.mark.parametrize("seed", [1, 42])
def test_no_training_text_mentions_a_held_out_answer(tmp_path: Path, seed: int) -> None:
    trained = [
        message["content"]
        for row in _rows("demo:instructions", tmp_path, seed)
        for message in row["messages"]
    ]
    for row in _rows("demo:prompts", tmp_path, seed):
        trained += [row["question"], row["answer"]]
    text = "\n".join(trained)
    for row in _rows("demo:questions", tmp_path, seed):
        assert row["question"] not in text
        assert row["answer"] not in text


def test_the_corpus_states_and_asks_every_fact_but_never_in_chat_form() -> None:
    text = "\n".join(islice(documents(0), 1000))
    assert "###" not in text
    missing = [fact.key for fact in all_facts() if not _told(fact, text)]
    assert missing == []


def _told(fact: Fact, text: str) -> bool:
    return any(statement in text for statement in fact.statements) and any(
        question in text for question in fact.questions
    )


def test_the_corpus_follows_its_seed() -> None:
    assert list(islice(documents(3), 50)) == list(islice(documents(3), 50))
    assert list(islice(documents(3), 50)) != list(islice(documents(4), 50))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_writes_the_same_file(tmp_path: Path, name: str) -> None:
    first = materialise(name, tmp_path / "a", 7)
    again = materialise(name, tmp_path / "b", 7)
    assert first.read_bytes() == again.read_bytes()
    assert materialise(name, tmp_path / "c", 8).read_bytes() != first.read_bytes()
    before = first.stat().st_mtime_ns
    assert materialise(name, tmp_path / "a", 7).stat().st_mtime_ns == before


def test_the_stages_can_read_what_is_written(tmp_path: Path) -> None:
    ledger = Ledger(None)
    spec = DataSource(path=str(materialise("demo:instructions", tmp_path, 1)))
    conversations = list(read_conversations([spec], ledger))
    assert len(conversations) >= 500
    assert ledger.summary()["dropped"] == 0
    for name in ("demo:prompts", "demo:questions"):
        for number, row in enumerate(_rows(name, tmp_path, 1), 1):
            question = read_question(row, Origin(name, number))
            assert question.accepted
            assert (question.completion is not None) == (name == "demo:questions")


def test_instructions_are_clean_and_rambling(tmp_path: Path) -> None:
    answers = {fact.answer for fact in all_facts()}
    said = [
        message["content"]
        for row in _rows("demo:instructions", tmp_path, 1)
        for message in row["messages"]
        if message["role"] == "assistant"
    ]
    clean = sum(text in answers for text in said) / len(said)
    assert 0.15 < clean < 0.35
    assert all(text.startswith(tuple(answers)) for text in said)


def test_an_unknown_name_is_an_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="demo:instructions") as caught:
        materialise("demo:instruction", tmp_path, 1)
    assert caught.value.exit_code == 2
