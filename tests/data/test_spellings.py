"""Rows of widely used sets are what the same texts under the known keys would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.formats.format import Fields, Format, InvalidRecord
from tandem.data.formats.known_formats import detect
from tandem.data.ledger import Ledger
from tandem.data.read_records import read_conversations
from tandem.data.records import Origin
from tandem.data.sources.chunks import Renaming
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

ORIGIN = Origin("made.jsonl", 7)
TURNS = [
    {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
    {"role": "user", "content": "P"}, {"role": "assistant", "content": "B"},
]  # fmt: skip
CHOSEN, REJECTED = TURNS[:2], [TURNS[0], TURNS[3]]


def known(row: Fields) -> Format:
    found = detect(row)
    assert found
    return found


@pytest.mark.parametrize(
    ("name", "row", "plain"),
    [
        (
            "question and answer",
            {"question": "Q", "answer": "A"},
            {"prompt": "Q", "completion": "A"},
        ),
        (
            "query and response",
            {"type": "GSM", "query": "Q", "original_question": "O", "response": "A"},
            {"prompt": "Q", "completion": "A"},
        ),
        (
            "query and response",
            {"query": "Q", "response": "A", "system": "S", "history": [["P", "B"]], "input": "no"},
            {"instruction": "Q", "output": "A", "system": "S", "history": [["P", "B"]]},
        ),
        (
            "question and answer",
            {"question": "Q", "context": "C", "answer": "A"},
            {"instruction": "Q", "input": "C", "output": "A"},
        ),
        (
            "question and response",
            {"id": "niv.1", "system_prompt": "S", "question": "Q", "response": "A"},
            {"prompt": "Q", "completion": "A", "system": "S"},
        ),
        (
            "question and response",
            {"system_prompt": "", "question": "Q", "response": "A"},
            {"prompt": "Q", "completion": "A"},
        ),
        (
            "prompt and response",
            {"prompt": "Q", "response": "A", "helpfulness": 3, "system": "S"},
            {"prompt": "Q", "completion": "A", "system": "S"},
        ),
        (
            "instruction and response",
            {"instruction": "Q", "context": "C", "response": "A", "category": "open_qa"},
            {"instruction": "Q", "input": "C", "output": "A"},
        ),
        ("conversation", {"conversation": TURNS, "turn": 2}, {"messages": TURNS}),
        (
            "conversation",
            {"conversation": [{"input": "Q", "output": "A"}, {"input": "P", "output": "B"}]},
            {"messages": TURNS},
        ),
        (
            "input preference",
            {"system": "S", "input": "Q", "chosen": "A", "rejected": "B", "status": "tie"},
            {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"},
        ),
        (
            "response preference",
            {"instruction": "Q", "chosen_response": "A", "rejected_response": "B"},
            {"instruction": "Q", "chosen": "A", "rejected": "B"},
        ),
        # Messages that bring their prompt: the other columns repeat it.
        (
            "explicit preference",
            {"question": "Q", "prompt": "Q", "chosen": CHOSEN, "rejected": REJECTED},
            {"prompt": "Q", "chosen": "A", "rejected": "B"},
        ),
        (
            "implicit preference",
            {"question": "Q", "chosen": CHOSEN, "rejected": REJECTED},
            {"chosen": CHOSEN, "rejected": REJECTED},
        ),
        (
            "implicit preference",
            {"input": "Q", "conversation": TURNS, "chosen": CHOSEN, "rejected": REJECTED},
            {"chosen": CHOSEN, "rejected": REJECTED},
        ),
    ],
)
def test_other_keys_make_the_same_record(
    name: str, row: dict[str, Any], plain: dict[str, Any]
) -> None:
    assert known(row).name == name
    assert known(row).read(row, ORIGIN) == known(plain).read(plain, ORIGIN)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "Q", "answer": None}, "`answer` is null or missing"),
        ({"question": 3, "answer": "A"}, "`question` is not a text"),
        ({"instruction": "Q", "context": 3, "response": "A"}, "`context` is not a text"),
        ({"input": "Q", "chosen": "A", "rejected": "A"}, "identical answers"),
        ({"conversation": [{"input": "Q", "output": None}]}, "a turn's `content` is null"),
        ({"conversation": []}, "`conversation` is not a list of turns"),
    ],
)
def test_reasons_speak_of_the_keys_that_the_row_has(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRecord, match=reason):
        known(row).read(row, ORIGIN)


def test_unknown_rows_are_told_what_would_make_them_known(tmp_path: Path) -> None:
    def refusal(row: Fields, **said: Any) -> str:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        source = DataSource(path=str(tmp_path / "rows.jsonl"), **said)
        with pytest.raises(UserError) as caught:
            list(read_conversations([source], Ledger(None)))
        return str(caught.value)

    said = {"dialogue": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    assert refusal(said).endswith(
        "But `dialogue` holds turns: say so with `fields: {messages: dialogue}` in a recipe, or "
        "--fields messages=dialogue."
    )
    named = DataSource(path=str(tmp_path / "rows.jsonl"), fields={"messages": "dialogue"})
    assert len(list(read_conversations([named], Ledger(None)))) == 1
    assert "does not say what is asked" in refusal({"text": "### Human: hello"})
    assert "If only names differ" in refusal({"asked": "Q", "answered": "A"})

    # Turns alone do not say that they are the record.
    context = [{"role": "user", "content": "Q"}]
    answer = [{"role": "assistant", "content": "A"}]
    assert refusal({"input": context, "output": "A"}).endswith(
        "But `input` holds turns up to a question: say so, and where its answer is, with "
        "`fields: {prompt: input, completion: ...}`, or --fields prompt=input and so on."
    )
    assert "`a` and `b` hold turns" in refusal({"a": [*context, *answer], "b": context + answer})
    prompt = DataSource(
        path=str(tmp_path / "rows.jsonl"), fields={"prompt": "input", "completion": "output"}
    )
    (tmp_path / "rows.jsonl").write_text(json.dumps({"input": context, "output": "A"}) + "\n")
    assert len(list(read_conversations([prompt], Ledger(None)))) == 1


def test_images_that_a_text_needs_are_not_left_out_in_silence(tmp_path: Path) -> None:
    def dropped(text: str, **more: object) -> list[str]:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "A"}]
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, **more}) + "\n")
        ledger = Ledger(None)
        list(read_conversations([DataSource(path=str(tmp_path / "rows.jsonl"))], ledger))
        return [entry.reason for entry in ledger.entries]

    assert dropped("<image>\nWhat is it?", images=["a.png"]) == [
        "the text has places for `images`, and only text is read"
    ]
    assert not dropped("What is <image>?", images=[])
    assert not dropped("What is it?", image="cover.png")


def test_a_recipe_may_rename_these_keys_as_well() -> None:
    renaming = Renaming((("conversation", "dialogue"),), (("bot", "assistant"),))
    said = [TURNS[0], {"role": "bot", "content": "A"}]
    row = renaming.apply({"dialogue": said})
    (record,) = known(row).read(row, ORIGIN)
    assert record == known({"messages": 0}).read({"messages": TURNS[:2]}, ORIGIN)[0]
