"""Rows of tokens that another tokenizer made: said before training, by every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tandem.storage.atomic_files import read_json

from .desk import Desk


def file(desk: Desk, name: str, rows: list[dict[str, Any]]) -> Path:
    return Path(desk.text("".join(json.dumps(row) + "\n" for row in rows), name))


def token_rows(count: int, last: int = 7) -> list[dict[str, Any]]:
    """Rows of a few ids, the last one of which has one more."""
    rows = [[1, 3, 5 + number % 20, 4] for number in range(count)]
    rows[-1].append(last)
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in rows]


def token_pairs(count: int, last: int = 7) -> list[dict[str, Any]]:
    rows = [[1, 3, 5 + number % 20] for number in range(count)]
    pairs = [{"prompt_ids": ids, "chosen_ids": [4, 2], "rejected_ids": [6, 2]} for ids in rows]
    pairs[-1]["rejected_ids"] = [last, 2]
    return pairs


def test_what_is_trained_is_not_asked_of_tokens(desk: Desk) -> None:
    rows, texts = (
        file(desk, "rows.jsonl", token_rows(8)),
        file(desk, "t.jsonl", [{"text": "a b c"}]),
    )
    recipe = desk.recipe(sft__data=[str(rows)], sft__loss_on="text")
    desk.refused(["run", recipe], "loss_on: text has no effect, because all data is tokens")
    recipe = desk.recipe(sft__data=[str(rows), str(texts)], sft__loss_on="text")
    desk.accepted(["run", recipe])


def test_a_model_without_a_template_trains_on_tokens_of_both_kinds(desk: Desk) -> None:
    config = read_json(desk.model / "tokenizer_config.json")
    assert not config.pop("chat_template", None)
    assert not (desk.model / "chat_template.jinja").exists()
    rows, pairs = file(desk, "rows.jsonl", token_rows(8)), file(desk, "p.jsonl", token_pairs(8))
    recipe = desk.recipe(sft__data=str(rows), dpo__data=str(pairs))
    said = " ".join(desk.accepted(["run", recipe]).split())
    assert "sft: rows.jsonl is tokens" in said
    assert "dpo: p.jsonl is token pairs" in said
    summaries = [read_json(path) for path in (desk.home / "run").glob("*/summary.json")]
    ledgers = [one["ledger"] for one in summaries if "ledger" in one]
    assert [(one["read"], one["trained"]) for one in ledgers] == [(8, 8)] * 2


def test_an_id_that_the_model_has_no_row_for_is_refused_by_every_command(desk: Desk) -> None:
    rows = file(desk, "rows.jsonl", token_rows(8, 99_999))
    needles = ("rows.jsonl, row 8: the id 99999 ", "the model's own tokenizer")
    desk.refused(desk.train(dataset_name=rows), *needles)
    desk.refused(["check", str(rows), "--model", str(desk.model)], *needles)
    desk.refused(["show", str(rows), "--row", "8", "--model", str(desk.model)], *needles)
    recipe = desk.recipe(sft__data=str(rows))
    for argv in (["run", recipe], ["run", recipe, "--dry-run"], ["plan", recipe]):
        desk.refused(argv, *needles)


def test_such_pairs_of_a_later_stage_are_refused_before_the_first(desk: Desk) -> None:
    pairs = file(desk, "p.jsonl", token_pairs(8, 99_999))
    recipe = desk.recipe(dpo__data=str(pairs))
    desk.refused(["run", recipe], "p.jsonl, row 8: the id 99999 ")


def test_pairs_of_tokens_are_no_data_of_sft_nor_rows_of_dpo(desk: Desk) -> None:
    rows, pairs = file(desk, "rows.jsonl", token_rows(8)), file(desk, "p.jsonl", token_pairs(8))
    desk.refused(
        desk.train(dataset_name=pairs),
        "holds token pairs (chosen_ids, prompt_ids, rejected_ids), but this stage",
    )
    desk.refused(desk.train("dpo", dataset_name=rows), "holds tokens (input_ids, labels), but")


def test_prompts_cannot_be_made_of_tokens(desk: Desk) -> None:
    rows = file(desk, "rows.jsonl", token_rows(8))
    recipe = desk.recipe(pairs={"prompts": str(rows), "max_new_tokens": 4}, sft=None, dpo__data=[])
    desk.refused(["run", recipe, "--until", "pairs"], "rows.jsonl, row 1", "has no turns")


def test_bad_rows_are_dropped_and_too_many_stop_the_run(desk: Desk) -> None:
    rows = token_rows(8)
    rows[3]["labels"] = [-100] * 4
    path = file(desk, "rows.jsonl", rows)
    desk.refused(desk.train(dataset_name=path), "1 x no token is a target", "rows.jsonl, row 4")
    desk.accepted(desk.train(dataset_name=path, max_dropped=0.2))
