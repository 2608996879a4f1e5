"""Raw text through every command: what is trained, planned and shown, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.cli.main import main
from tandem.storage.atomic_files import read_json, read_jsonl

from .desk import Desk


@pytest.fixture
def texts(desk: Desk) -> Path:
    """Ten documents, one of them long."""
    rows: list[dict[str, Any]] = [
        {"text": f"say red {number}\n", "url": "x"} for number in range(10)
    ]
    rows[2]["text"] *= 60
    return Path(desk.text("".join(json.dumps(row) + "\n" for row in rows), "texts.jsonl"))


def test_documents_are_trained_and_held_out_whole(desk: Desk, texts: Path) -> None:
    validation = {"fraction": 0.3, "steps": 1}
    recipe = desk.recipe(
        sft__data=str(texts), sft__loss_on="text", sft__max_length=64, sft__validation=validation,
        dpo=None,
    )  # fmt: skip
    said = " ".join(desk.accepted(["run", recipe]).split())
    assert "sft: texts.jsonl is raw text; not read: url" in said
    (summary,) = (
        one for one in map(read_json, (desk.home / "run").glob("*/summary.json")) if "ledger" in one
    )
    ledger = summary["ledger"]
    assert ledger["read"] == ledger["trained"] + ledger["held_out"] == 10
    assert (ledger["split"], ledger["truncated"], ledger["dropped"]) == (1, 0, 0)
    held_out = ledger["held_out"]
    assert 0 < held_out < 10
    assert f"{held_out} of 10 records are held out, with every record of their {held_out} " in said
    (line,) = read_jsonl(next((desk.home / "run").glob("*/data-ledger.jsonl")))
    assert (line["row"], line["outcome"]) == (3, "split")
    assert "1 split, " in said
    report = next((desk.home / "run").rglob("report.html")).read_text()
    assert "split" in report


def test_a_plan_counts_pieces(desk: Desk, texts: Path) -> None:
    def planned(max_length: int) -> dict[str, Any]:
        recipe = desk.recipe(
            sft__data=str(texts), sft__loss_on="text", sft__max_length=max_length,
            sft__max_steps=None, sft__epochs=1, dpo=None,
        )  # fmt: skip
        assert main(["plan", recipe, "--json"]) == 0
        (stage,) = json.loads(desk.capsys.readouterr().out)["training"]
        return stage

    stage, other = planned(64), planned(128)
    assert (stage["records"]["read"], stage["records"]["split"]) == (10, 1)
    assert stage["work"]["longest"] == 63  # rows that are fed: the last token predicts nothing
    # Every token but the first of each document, whatever the pieces are.
    assert other["work"]["targets"] == stage["work"]["targets"]
    assert other["work"]["steps"] < stage["work"]["steps"]


def test_answers_of_raw_text_are_refused_by_every_command(desk: Desk, texts: Path) -> None:
    needles = ("texts.jsonl, row 1: its `text`", "`loss_on: text`")
    desk.refused(desk.train(dataset_name=texts), *needles)
    recipe = desk.recipe(sft__data=str(texts))
    for argv in (["run", recipe], ["plan", recipe], ["check", "--recipe", recipe]):
        desk.refused(argv, *needles)
    show = ["show", str(texts), "--row", "1", "--recipe", recipe]
    desk.refused(show, *needles)
    desk.refused(desk.train("dpo", dataset_name=texts), "trains on preference pairs")


def test_nothing_else_is_made_of_raw_text(desk: Desk, texts: Path) -> None:
    pairs = {"prompts": str(texts), "max_new_tokens": 4}
    recipe = desk.recipe(pairs=pairs, sft=None, dpo__data=[])
    desk.refused(["run", recipe, "--until", "pairs"], "texts.jsonl, row 1: its `text`")
    held = ["eval", str(desk.model), "--heldout", str(texts), "--output_dir", "e"]
    desk.stopped(held, "texts.jsonl, row 1: its `text`")
