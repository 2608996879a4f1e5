"""What does not fit the context outside training is said or refused, never cut in silence."""

from __future__ import annotations

import json
from typing import Any

from tandem.storage.atomic_files import read_json, read_jsonl

from .desk import Desk

LONG = "say " + "red " * 300


def _questions(desk: Desk, *texts: str) -> str:
    rows = [{"question": text, "answer": "red", "completion": "red green"} for text in texts]
    return desk.text("".join(json.dumps(row) + "\n" for row in rows), "questions.jsonl")


def _pairs_recipe(desk: Desk, *prompts: str) -> str:
    pairs: dict[str, Any] = {"prompts": _questions(desk, *prompts), "max_new_tokens": 8}
    return desk.recipe(pairs=pairs, dpo__data=[])


def test_prompts_without_room_for_an_answer_are_in_the_ledger(desk: Desk) -> None:
    recipe = _pairs_recipe(desk, "say red", LONG, "say blue")
    said = desk.accepted(["run", recipe, "--until", "pairs"])
    assert "pairs: 1 of 3 prompts leave no room for 8 tokens in the model's context of 256" in said
    folder = desk.home / "run" / "3-pairs"
    (entry,) = read_jsonl(folder / "data-ledger.jsonl")
    assert (entry["row"], entry["outcome"]) == (2, "dropped")
    assert read_json(folder / "summary.json")["ledger"]["read"] == 3


def test_when_no_prompt_has_room_the_way_out_is_named(desk: Desk) -> None:
    recipe = _pairs_recipe(desk, LONG)
    desk.accepted(["run", recipe, "--until", "sft-merge"])
    desk.stopped(["run", recipe], "none of 1 prompts can be asked", "pairs.max_new_tokens")
    desk.accepted(["run", _pairs_recipe(desk, "say red"), "--until", "pairs"])


def test_questions_beyond_the_context_are_refused_and_the_rest_is_kept(desk: Desk) -> None:
    questions = _questions(desk, "say red", LONG)
    recipe = desk.recipe(evaluate={"questions": questions, "max_new_tokens": 8})
    desk.stopped(["run", recipe], "questions.jsonl, row 2", "context of 256")
    _questions(desk, "say red")
    said = desk.accepted(["run", recipe])
    assert said.count("finished with these inputs") == 4


def test_pairs_that_evaluation_cuts_are_said(desk: Desk) -> None:
    row = {"question": LONG, "chosen": "red", "rejected": "blue"}
    six = "".join(desk.pairs.read_text().splitlines(keepends=True)[:6])
    pairs = desk.text(six + json.dumps(row) + "\n", "heldout.jsonl")
    said = desk.accepted(["run", desk.recipe(evaluate={"pairs": pairs})])
    assert said.count("of 7 pairs, 1 were cut to the model's context of 256") == 3
