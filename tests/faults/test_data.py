"""Bad data: the message names file and row, and nothing is written."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import signal
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from tandem.cli.main import main
from tandem.data.formats.turns import UNKNOWN_ROLE
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.train import trainer

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


CUT_GZIP = gzip.compress(b'{"conversations": []}\n' * 9, mtime=0)[:-9]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", b"PAR1 and no more", "a.parquet is a damaged Parquet file"),
        ("a.docx", b"a,b\n", "a.docx is not of a kind that can be read"),
        ("a.arrow", b"ARROW1 and no more", "a.arrow is a damaged Arrow file"),
        ("a.csv", b"a,a\n1,2\n", "the header of"),
        ("a.json", b'[{"conversations": []}, {', "a.json, row 2"),
        ("a.jsonl.gz", CUT_GZIP, "the gzip data is cut"),
        ("a.json", b'{\n  "data": []\n}', "a.json is a JSON object over several lines"),
        ("a.jsonl.zst", b"no zstd", "a.jsonl.zst, row 1: the record and what follows cannot"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    desk: Desk, name: str, content: bytes, said: str
) -> None:
    (desk.home / name).write_bytes(content)
    desk.refused(desk.train(dataset_name=name), said)


TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]


def talk(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "Words."} for role in roles]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (talk("assistant", "user", "assistant"), "roles out of order"),
        (talk("user", "user", "assistant"), "roles out of order"),
        (talk("system", "system", "user", "assistant"), "more than one system turn"),
        (talk("user"), "no assistant turn"),
        ({"messages": None}, "`messages` is not a list of turns"),
        ({"messages": [None]}, "`messages` holds a turn that is not an object"),
        ({"messages": [{"role": "user", "content": None}, TALK[1]]}, "null or missing"),
        ({"messages": [{"role": "user", "content": 12}, TALK[1]]}, "`content` is not a text"),
        ({"messages": [{"role": "host", "content": "Hi."}, TALK[1]]}, UNKNOWN_ROLE),
        (
            {"prompt": "Why?", "completion": "So."},
            "a row of another format than its source's first (prompt and completion, not messages)",
        ),
        (
            {"messages": None, "instruction": "Why?", "output": "So."},
            "a row of another format than its source's first (Alpaca, not messages)",
        ),
        ({"texts": "Why?"}, "`messages` is not a list of turns"),
        (
            {"text": "Why?"},
            "a row of another format than its source's first (raw text, not messages)",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_in_the_ledger_with_its_reason(
    desk: Desk, row: dict[str, Any], reason: str
) -> None:
    rows = [{"messages": TALK}] * 25
    rows.insert(7, row)
    data = desk.text("".join(json.dumps(one) + "\n" for one in rows), "mixed.jsonl")
    said = desk.accepted(desk.train(dataset_name=data))
    assert "25 of 26 records to train on, 0 truncated, 1 dropped" in said
    (entry,) = read_jsonl(desk.home / "out" / "data-ledger.jsonl")
    assert (entry["file"], entry["row"], entry["outcome"]) == (data, 8, "dropped")
    assert reason in entry["reason"]


def test_a_cut_off_file_is_trained_as_far_as_it_goes_on_demand(desk: Desk) -> None:
    rows = desk.conversations.read_bytes()
    for level in (0, 9):
        packed = gzip.compress(rows, level)
        (desk.home / "cut.jsonl.gz").write_bytes(packed[: len(packed) * 3 // 4])
        call = desk.train(dataset_name="cut.jsonl.gz", output_dir=desk.home / f"out{level}")
        message = desk.refused(call, "cut.jsonl.gz, row ", "the gzip data is cut off")
        row = int(message.partition("cut.jsonl.gz, row ")[2].partition(":")[0])
        desk.accepted([*call, "--on_bad_record", "drop", "--max_dropped", "0.1"])
        ledger = read_json(desk.home / f"out{level}" / "summary.json")["ledger"]
        assert (ledger["read"], ledger["dropped"]) == (row, 1)
        assert 5 < row < 24


def test_an_array_where_lines_are_expected_is_read(desk: Desk) -> None:
    rows = [json.loads(line) for line in desk.conversations.read_text().splitlines()]
    data = desk.text(json.dumps(rows, indent=2), "array.jsonl")
    assert "24 of 24 records to train on" in desk.accepted(desk.train(dataset_name=data))


def test_a_table_with_a_short_row_names_it(desk: Desk) -> None:
    with (desk.home / "pairs.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "chosen", "rejected"])
        table.writerows(["Why,\nindeed?", f'So "{i}".', "No."] for i in range(24))
        table.writerow(["Why?", "So."])
    call = desk.train("dpo", dataset_name="pairs.csv")
    desk.refused(call, "pairs.csv, row 25", "has 2 cells, while the header has 3")
    said = desk.accepted([*call, "--on_bad_record", "drop"])
    assert "24 of 25 records to train on" in said


def test_what_a_recipe_says_about_rows_is_checked(desk: Desk) -> None:
    rows = [json.loads(line) for line in desk.pairs.read_text().splitlines()]
    own = [{"ask": r["question"], "good": r["chosen"], "bad": r["rejected"]} for r in rows]
    data = desk.text("".join(json.dumps(row) + "\n" for row in own), "own.jsonl")
    names = {"question": "ask", "chosen": "good", "rejected": "bad"}
    desk.refused(
        ["run", desk.recipe(dpo__data={"path": data, "fields": {**names, "chosen": "godo"}})],
        "`fields` names 'godo', which no row has. Did you mean 'good'?",
    )
    desk.refused(
        ["run", desk.recipe(dpo__data={"path": data, "format": "orca_dpo_pear"})],
        "there is no format 'orca_dpo_pear'. Did you mean 'orca_dpo_pairs'?",
    )
    desk.refused(
        ["run", desk.recipe(dpo__data={"path": data, "fields": names, "roles": {"bot": "robot"}})],
        "roles",
        "assistant",
    )
    recipe = desk.recipe(dpo__data={"path": data, "fields": names})
    desk.accepted(["run", recipe, "--until", "dpo"])
    ledger = read_json(desk.home / "run" / "4-dpo" / "summary.json")["ledger"]
    assert (ledger["read"], ledger["formats"]) == (24, {data: "orca_dpo_pairs"})


def test_labelled_and_scored_answers_train_and_add_up(desk: Desk) -> None:
    rows = [json.loads(line) for line in desk.pairs.read_text().splitlines()]
    labelled = [
        {"prompt": row["question"], "completion": row[key], "label": key == "chosen"}
        for key in ("chosen", "rejected")
        for row in rows
    ][:-1]
    scored = [
        {
            "instruction": row["question"],
            "completions": [
                {"response": text, "overall_score": score}
                for text, score in ((row["rejected"], 1), (row["chosen"], 9), ("Perhaps.", None))
            ],
        }
        for row in rows
    ]
    for name, data, counts in (
        ("kto.jsonl", labelled, (24, 23, 1)),
        ("ultra.jsonl", scored, (48, 24, 24)),
    ):
        desk.text("".join(json.dumps(row) + "\n" for row in data), name)
        out = desk.home / f"out-{name}"
        desk.accepted(desk.train("dpo", dataset_name=name, output_dir=out, max_dropped=0.5))
        ledger = read_json(out / "summary.json")["ledger"]
        assert (ledger["read"], ledger["trained"], ledger["dropped"]) == counts


def test_prompts_of_the_wrong_kind_are_found_before_the_first_stage(desk: Desk) -> None:
    pairs = {"prompts": str(desk.pairs)}
    desk.refused(["run", desk.recipe(pairs=pairs, dpo__data=[])], "holds preference pairs")
    assert not (desk.home / "run").exists()


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


def test_what_lies_in_the_runs_own_folder_is_no_data(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = desk.home / "data"
    data.mkdir()
    desk.conversations.rename(data / "conversations.jsonl")
    call = desk.train(dataset_name="data", output_dir="data/out", max_steps=3)
    plain = trainer.Trainer._take

    def take(self: Any, step: Any) -> Any:
        report = plain(self, step)
        os.kill(os.getpid(), signal.SIGTERM)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_take", take)
        assert main(call) == 3
    assert (data / "out" / "checkpoints").is_dir()
    said = desk.accepted(call)
    assert "24 of 24 records to train on" in said
    assert "sft: not read of data: out (the folder of a run of tandem)" in said
    assert "nothing to do" in desk.accepted(call)
    assert "not read of data: out" in desk.accepted(["check", "data"])


def test_names_that_are_no_utf8_train_and_are_recognised_again(desk: Desk) -> None:
    assert isinstance(sys.stderr, TextIOWrapper)
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own is
    data, out = (os.fsdecode(name) for name in (b"donn\xe9es.jsonl", b"sortie\xe9"))
    rows = [json.loads(line) for line in desk.conversations.read_text().splitlines()]
    rows[0] = {"\ud800": "half", **rows[0]}
    desk.text("".join(json.dumps(row) + "\n" for row in [*rows, {"conversations": []}]), data)
    call = desk.train(dataset_name=data, output_dir=out)
    desk.accepted(call)
    assert "nothing to do" in desk.accepted(call)
    ledger = read_json(desk.home / out / "summary.json")["ledger"]
    assert ledger["unread_keys"] == {data: ["\ud800"]}
    assert read_jsonl(desk.home / out / "data-ledger.jsonl")[-1]["file"] == data
    # What was trained is there; the libraries that read weights open no such name.
    way_out = "Rename it, or make a link with another name"
    desk.refused(desk.merge(desk.model, desk.home / out), "safetensors cannot open files", way_out)
    odd = shutil.copytree(desk.model, desk.home / f"model-{out}")
    desk.refused(desk.train(model_name_or_path=odd), "safetensors cannot open files", way_out)
    (desk.home / "link").symlink_to(desk.home / out)
    desk.accepted(desk.merge(desk.model, desk.home / "link"))
    desk.refused(["run", desk.recipe(), f"output_dir={out}"], "special characters are not")


def test_the_current_folder_is_called_by_its_dot(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (desk.home / "data").mkdir()
    desk.conversations.rename(desk.home / "data" / "conversations.jsonl")
    monkeypatch.chdir(desk.home / "data")
    assert "sft: . is ShareGPT" in desk.accepted(desk.train(dataset_name="."))
