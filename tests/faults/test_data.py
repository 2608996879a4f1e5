"""Bad data: the message names file and row, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.artifact.files import read_json, read_jsonl

from .desk import Desk

PAIR = '{"question": "q", "chosen": "a", "rejected": "b"}\n'


@pytest.mark.parametrize("name", ["nothing.jsonl", "./nothing", "data/nothing.jsonl", "a/b/c"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_data_that_is_not_there_is_never_looked_for_on_the_hub(
    desk: Desk, stage: str, name: str
) -> None:
    desk.refused(
        desk.train(stage, dataset_name=name), f"no file or folder {name}", "Check the path"
    )


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_data_is_named(desk: Desk, text: str) -> None:
    desk.refused(desk.train(dataset_name=desk.text(text, "empty.jsonl")), "empty.jsonl is empty")


def test_an_empty_folder_of_data_is_named(desk: Desk) -> None:
    (desk.home / "data").mkdir()
    desk.refused(desk.train(dataset_name=desk.home / "data"), "data holds no .jsonl")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"conversations": [', "not valid JSON"),
        (b'{"conversations": "\xff"}', "not valid UTF-8"),
        (b"[]", "is a JSON list, not an object"),
    ],
)
def test_a_malformed_row_stops_the_run_or_goes_to_the_ledger(
    desk: Desk, line: bytes, reason: str
) -> None:
    rows = desk.conversations.read_bytes().split(b"\n")
    rows[4] = line
    bad = desk.home / "bad.jsonl"
    bad.write_bytes(b"\n".join(rows))
    message = desk.refused(desk.train(dataset_name=bad), "bad.jsonl, row 5", reason)
    assert "on_bad_record: drop" in message
    said = desk.accepted(desk.train(dataset_name=bad, on_bad_record="drop"))
    assert "23 of 24 records to train on" in said
    assert "1 dropped" in said
    entries = read_jsonl(desk.home / "out" / "data-ledger.jsonl")
    (dropped,) = (entry for entry in entries if entry["outcome"] == "dropped")
    assert (dropped["file"], dropped["row"]) == (str(bad), 5)
    assert reason in dropped["detail"]
    assert read_json(desk.home / "out" / "summary.json")["ledger"]["read"] == 24


def test_too_many_dropped_records_stop_the_run(desk: Desk) -> None:
    rows = desk.conversations.read_text().splitlines()
    empty = '{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": ""}]}'
    lone = '{"conversations": [{"from": "human", "value": "Why?"}]}'
    data = desk.text("\n".join([*rows[:16], empty, *[lone] * 4, *rows[16:]]), "gaps.jsonl")
    message = desk.refused(
        desk.train(dataset_name=data),
        "5 of 29 records would be dropped, 17.2%; max_dropped allows 5.0%",
        "(gaps.jsonl, row 18; gaps.jsonl, row 19; gaps.jsonl, row 20; ...)",
        "Mend the data, or set max_dropped",
    )
    assert "4 x " in message
    assert "(gaps.jsonl, row 17)" in message
    said = desk.accepted(desk.train(dataset_name=data, max_dropped=0.18))
    assert "24 of 29 records to train on" in said
    # It is no part of what a finished stage depends on.
    desk.accepted(desk.train(dataset_name=data, max_dropped=0.2))


def test_the_other_stages_data_is_recognised(desk: Desk) -> None:
    desk.refused(desk.train(dataset_name=desk.pairs), "preference pairs", "this stage trains on")
    desk.refused(desk.train("dpo", dataset_name=desk.conversations), "holds conversations")


def test_rows_of_no_known_format_show_their_keys(desk: Desk) -> None:
    data = desk.text('{"ask": "a", "reply": "b"}\n', "odd.jsonl")
    desk.refused(desk.train(dataset_name=data), "odd.jsonl, row 1", "ask, reply")


def test_rows_that_cannot_be_trained_are_counted_by_reason(desk: Desk) -> None:
    data = desk.text('{"conversations": [{"from": "human", "value": "a"}]}\n' * 5, "mute.jsonl")
    desk.refused(desk.train(dataset_name=data), "none of the 5 records", "no assistant turn: 5")
    few = desk.train("dpo", max_prompt_length=50)
    said = "pairs.jsonl, row 1: nothing left to train (the template alone exceeds 50 tokens)"
    desk.refused(few, "none of the 24 records", said)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"PAR1 and no more", "a.parquet is no sound Parquet file"),
        ("a.csv", b"a,b\n", "a.csv is no kind of file that can be read here"),
        ("a.json", b'[{"conversations": []}, {', "a.json, row 2"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    desk: Desk, name: str, content: bytes, said: str
) -> None:
    (desk.home / name).write_bytes(content)
    desk.refused(desk.train(dataset_name=name), said)


def test_a_later_stages_bad_row_is_found_before_the_first_stage(desk: Desk) -> None:
    desk.text(PAIR + "{\n", "late.jsonl")
    recipe = desk.recipe(dpo__data="late.jsonl")
    desk.refused(["run", recipe], "late.jsonl, row 2", "not valid JSON")
    desk.text(PAIR * 9 + PAIR.replace('"b"', '"a"'), "late.jsonl")
    desk.refused(["run", recipe], "1 of 10 records would be dropped", "(late.jsonl, row 10)")
    desk.refused(["run", desk.recipe(dpo__data="./late2.jsonl")], "no file or folder ./late2.jsonl")
    questions = desk.text('{"question": "what?"}\n', "questions.jsonl")
    recipe = desk.recipe(evaluate={"questions": questions})
    desk.refused(["run", recipe], "questions.jsonl, row 1", "`answer` is null or missing")
    recipe = desk.recipe(pairs={"prompts": "prompts.jsonl"})
    desk.refused(["run", recipe], "no file or folder prompts.jsonl")


def test_data_changed_under_a_finished_stage_is_refused(desk: Desk) -> None:
    desk.accepted(desk.train())
    with desk.conversations.open("a") as file:
        file.write('{"conversations": []}\n')
    desk.refused(desk.train(), "finished sft stage with other inputs", "data:", "remove")


def test_a_row_that_only_dpo_would_stumble_over_can_be_dropped(desk: Desk, tmp_path: Path) -> None:
    late = desk.text(desk.pairs.read_text() + "{\n", "late.jsonl")
    recipe = desk.recipe(dpo__data=late, dpo__on_bad_record="drop")
    desk.accepted(["run", recipe, "--until", "dpo"])
    ledger = read_json(desk.home / "run" / "4-dpo" / "summary.json")["ledger"]
    assert (ledger["read"], ledger["dropped"]) == (25, 1)
