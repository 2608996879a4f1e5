"""`tandem check` and `tandem show` as they are typed: output, exit codes, what is refused."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tandem.cli.main import main

from ..check.made_data import conversation, pair, write
from ..warm.python import python

RECIPE = """
name: little
model: {model}
output_dir: {folder}/run
chat_template: neural-chat
sft:
  data: {folder}/sft.jsonl
  max_length: 420
  max_prompt_length: 200
dpo:
  data: {folder}/dpo.jsonl
  max_length: 400
evaluate:
  questions: {folder}/questions.jsonl
"""


@pytest.fixture
def recipe(tmp_path: Path, stories_path: Path) -> Path:
    """A recipe of both stages; one record is too long, one question is trained on."""
    rows = [conversation(seed) for seed in range(30)]
    rows[4] = conversation(4, exchanges=3)
    write(tmp_path / "sft.jsonl", rows)
    write(tmp_path / "dpo.jsonl", map(pair, range(30)))
    question = rows[7]["messages"][0]["content"]
    write(tmp_path / "questions.jsonl", [{"question": question, "answer": "Nobody knows."}])
    path = tmp_path / "little.yaml"
    path.write_text(RECIPE.format(model=stories_path, folder=tmp_path))
    return path


def _run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(word) for word in argv])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_page_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", map(conversation, range(30)))
    code, out, err = _run(capsys, "check", file)
    assert (code, err) == (0, "")
    assert f"{file}: messages, conversations" in out
    assert "30 records read as sft would: 30 to train on (0 of them truncated), 0 dropped" in out
    assert "lengths in characters; for tokens give --model or --recipe" in out
    assert "nothing was found that should be looked at" in out
    assert out.endswith("a run would train on this, as far as texts alone can tell\n")
    assert "\x1b" not in out


def test_texts_alone_need_no_training_library(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", map(conversation, range(3)))
    program = (
        "import sys\n"
        "from tandem.cli.main import main\n"
        f"assert main(['check', {str(file)!r}]) == 0\n"
        f"assert main(['show', {str(file)!r}, '--row', '1', '--text']) == 0\n"
        "print([n for n in ('torch', 'transformers', 'datasets') if n in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\n[]\n")


def test_a_recipe_is_checked_stage_by_stage(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _run(capsys, "check", "--recipe", recipe, "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found) == {
        "tandem", "recipe", "model", "chat_template", "notices", "trains", "data",
    }  # fmt: skip
    assert (found["recipe"], found["chat_template"], found["trains"]) == (
        "little", "neural-chat", True,
    )  # fmt: skip
    sft, dpo = found["data"]
    assert (sft["stage"], sft["kind"]) == ("sft", "conversations")
    assert (dpo["stage"], dpo["kind"]) == ("dpo", "preference pairs")
    assert sft["lengths"]["unit"] == dpo["lengths"]["unit"] == "tokens"
    assert (sft["lengths"]["max_length"], sft["lengths"]["max_prompt_length"]) == (420, 200)
    assert sft["records"]["truncated"] > 0
    shared = [finding for finding in sft["findings"] if finding["name"] == "shared_prompts"]
    assert [row["row"] for row in shared[0]["rows"]] == [8]
    assert not [finding for finding in dpo["findings"] if finding["name"] == "shared_prompts"]


def test_named_data_takes_the_recipes_stage_of_its_kind(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "other.jsonl", map(pair, range(9)))
    code, out, _ = _run(capsys, "check", file, "--recipe", recipe)
    assert code == 0
    assert "9 records read as dpo would" in out
    assert "limits: max_length 400; " in out


def _hold_out(recipe: Path, tmp_path: Path, *rows: dict[str, Any] | str) -> Path:
    """A data set that the SFT stage of a recipe holds out."""
    held = write(tmp_path / "held.jsonl", rows)
    text = recipe.read_text()
    recipe.write_text(text.replace("sft:\n", f"sft:\n  validation: {{data: {held}}}\n"))
    return held


def test_held_out_data_is_looked_at_as_a_run_reads_it(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = _hold_out(recipe, tmp_path, *map(conversation, range(40, 44)))
    code, out, _ = _run(capsys, "check", "--recipe", recipe, "--json")
    assert code == 0
    found = json.loads(out)["data"]
    assert [(one["stage"], one["held_out"]) for one in found] == [
        ("sft", False), ("sft", True), ("dpo", False),
    ]  # fmt: skip
    source = {"path": str(held), "format": "messages", "looked_at": True}
    assert found[1]["sources"] == [source]
    assert (found[1]["records"]["read"], found[1]["compared_with"]) == (4, [])
    code, out, _ = _run(capsys, "check", "--recipe", recipe, "--stage", "sft")
    assert code == 0
    assert "4 records read as sft would to hold them out: 4 to score (" in out
    assert "a run would score its adapters on this\n" in out


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([conversation(40), "{"], "held.jsonl, row 2: the record is not valid JSON"),
        ([conversation(40), pair(1)], "1 of 2 records would be dropped"),
        ([pair(1)], "held.jsonl holds preference pairs"),
    ],
)
def test_held_out_data_that_stops_a_run_is_exit_2(
    rows: list[dict[str, Any] | str],
    said: str,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _hold_out(recipe, tmp_path, *rows)
    code, out, err = _run(capsys, "check", "--recipe", recipe, "--json")
    assert code == 2
    value = json.loads(out)
    assert not value["trains"]
    assert [one["trains"] for one in value["data"]] == [True, False, True]
    assert said in value["data"][1]["problem"]
    assert err == f"error: {value['data'][1]['problem']}\n"


def test_the_page_shows_what_is_beyond_the_limit(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _run(capsys, "check", "--recipe", recipe, "--stage", "sft")
    assert code == 0
    assert "beyond max_length" in out
    assert "limits: max_length 420, max_prompt_length 200; " in out
    assert "would be truncated: " in out
    assert "read as dpo" not in out


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_what_would_not_train_is_exit_2_with_the_report(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", [*map(conversation, range(30)), "{"])
    code, out, err = _run(capsys, "check", file, *flags)
    assert code == 2
    reason = f"{file}, row 31: the record is not valid JSON"
    if flags:
        assert err.startswith(f"error: {reason}")
        found = json.loads(out)
        assert not found["trains"]
        assert f"error: {found['data'][0]['problem']}\n" == err
        assert found["data"][0]["records"]["trained"] == 30
    else:
        assert f"a run would stop here:\n{reason}" in out
        assert "30 to train on" in out
        # Not a second time.
        assert err == f"error: {file}: a run would stop, for the reason at the end of the page\n"


def test_a_missing_file_is_exit_2_and_json_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _run(capsys, "check", tmp_path / "none.jsonl", "--json")
    assert code == 2
    assert "there is no file or folder" in json.loads(out)["data"][0]["problem"]
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.jsonl", None, "there is no file or folder"),
        ("empty.jsonl", b"", "is empty."),
        ("blank.jsonl", b"\n \n", "is empty."),
        ("some.parquet", b"\x00\xff\x12" * 99, "is a damaged Parquet file"),
        ("some.csv", b"\x00\xff\r\x12" * 99, "carriage returns alone. Save it with line feeds"),
        ("some.bin", b"\x00\xff\x12" * 99, "is not of a kind that can be read"),
    ],
)
def test_of_what_cannot_be_read_the_reason_alone_is_said(
    name: str,
    content: bytes | None,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    code, out, err = _run(capsys, "check", file)
    assert (code, out) == (2, "")
    assert err.startswith("error: data: ")
    assert said in err
    assert err.count("\n") == 1


def test_beside_what_cannot_be_read_the_other_page_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write(tmp_path / "b.jsonl", map(pair, range(8)))
    code, out, err = _run(capsys, "check", tmp_path / "none.jsonl", pairs)
    assert code == 2
    assert out.startswith(f"{pairs}: ")
    assert "none.jsonl" not in out
    assert "there is no file or folder" in err


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_data_of_no_known_format_may_be_of_the_other_kind(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "Why?", "better": "So.", "worse": "No."}] * 30)
    notice = f"{file} is of no known format, and read as conversations; if it holds"
    code, out, err = _run(capsys, "check", file, *flags)
    assert code == 2
    assert notice in (json.loads(out)["notices"][0] if flags else err)
    assert "row 1: a record of no known format; its keys are: question, better, worse" in err
    code, _, err = _run(capsys, "check", file, "--stage", "dpo", *flags)
    assert code == 2
    assert "Known formats of preference pairs: " in err
    assert notice not in err


def test_rows_that_cannot_be_parsed_do_not_hide_the_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", ["{"] * 25 + [json.dumps(pair(n)) for n in range(9)])
    _, out, _ = _run(capsys, "check", file)
    assert out.startswith(f"{file}: explicit preference, preference pairs\n34 records read as dpo")


def test_rows_of_a_folder_are_told_with_their_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", map(conversation, range(9)))
    bad = write(folder / "b.jsonl", ["{"])
    code, out, _ = _run(capsys, "check", folder)
    assert code == 2
    assert "\n      b.jsonl, row 1  is not valid JSON" in out
    assert "Mend them: the first one stops a run, unless `on_bad_record: drop` is set." in out
    code, out, _ = _run(capsys, "check", bad)
    assert code == 2
    assert "1 record read" in out
    assert "\n      row 1  is not valid JSON" in out


def test_kinds_are_told_where_the_title_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [conversation(seed) for seed in range(30)]
    rows[3]["messages"][0]["content"] += " Write to jane.roe@some-house.org."
    rows[4]["messages"][0]["content"] += " The key is " + "ghp_" + "a1B2" * 9
    _, out, _ = _run(capsys, "check", write(tmp_path / "a.jsonl", rows))
    assert ": e-mail addresses\n" in out
    assert "(1 GitHub token)\n" in out


def test_data_of_both_kinds_is_checked_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (
        write(tmp_path / "a.jsonl", map(conversation, range(9))),
        write(tmp_path / "b.jsonl", map(pair, range(8))),
        write(tmp_path / "c.jsonl", map(conversation, range(9, 16))),
    )
    code, out, _ = _run(capsys, "check", *files, "--json")
    assert code == 0
    assert [one["records"]["read"] for one in json.loads(out)["data"]] == [16, 8]


def test_a_quick_look_says_that_it_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", map(conversation, range(30)))
    code, out, _ = _run(capsys, "check", file, "--limit", 7)
    assert code == 0
    assert "only the first 7 rows were looked at" in out
    assert "7 records read" in out


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_what_cannot_be_printed_is_printed_as_its_code(flags: list[str], tmp_path: Path) -> None:
    keys = {"\x1b[2J_is_safe": False, "half\ud83d": 1, "red\x1b[31m": 2}
    row = json.dumps({**conversation(1), **keys})
    file = tmp_path / os.fsdecode(b"b\xff.jsonl")
    write(file, [row, row])
    done = subprocess.run(
        [sys.executable, "-m", "tandem", "check", file, *flags],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert b"\x1b" not in done.stdout
    out = done.stdout.decode()
    if flags:
        (found,) = json.loads(out)["data"]
        assert found["unread_keys"] == list(keys)
        assert found["sources"][0]["path"] == str(file)
    else:
        assert "b\\udcff.jsonl: messages, conversations\n" in out
        assert "keys that are not read: \\x1b[2J_is_safe, half\\ud83d, red\\x1b[31m\n" in out
        assert "`\\x1b[2J_is_safe` says that the answer is bad" in out


def test_the_embedded_demo_is_clean_enough_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = _run(capsys, "check", "--recipe", "demo")
    assert code == 0
    assert "a run would train on this" in out
    assert not list(tmp_path.iterdir())


def test_pairs_that_are_not_made_yet_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = _run(capsys, "check", "--recipe", "demo", "--stage", "dpo")
    assert (code, out) == (2, "")
    assert "dpo.data is what its pairs stage makes" in err
    made = tmp_path / "runs" / "demo" / "3-pairs"
    made.mkdir(parents=True)
    write(made / "pairs.jsonl", map(pair, range(9)))
    assert _run(capsys, "check", "--recipe", "demo", "--stage", "dpo")[0] == 0


ONLY_PAIRS = """
name: preferences
model: {model}
output_dir: {folder}/run
chat_template: neural-chat
pairs:
  prompts: {folder}/prompts.jsonl
dpo: {{max_length: 400}}
"""


@pytest.fixture
def waiting(tmp_path: Path, stories_path: Path) -> Path:
    """A recipe whose DPO data is what its pairs stage makes, and nothing else is trained."""
    write(tmp_path / "prompts.jsonl", map(conversation, range(9)))
    path = tmp_path / "preferences.yaml"
    path.write_text(ONLY_PAIRS.format(model=stories_path, folder=tmp_path))
    return path


@pytest.mark.parametrize("argv", [["check"], ["check", "--json"], ["show", "--row", "1"]])
def test_nothing_to_look_at_is_exit_2(
    argv: list[str], waiting: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _run(capsys, *argv, "--recipe", waiting)
    assert (code, out) == (2, "")
    assert err.startswith("error: recipe preferences: dpo.data is what its pairs stage makes")
    assert err.count("\n") == 1


def test_a_recipe_that_trains_nothing_has_nothing_to_look_at(
    waiting: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting.write_text(waiting.read_text().replace("dpo: {max_length: 400}", ""))
    code, out, err = _run(capsys, "check", "--recipe", waiting)
    assert (code, out) == (2, "")
    assert "recipe preferences has neither an sft nor a dpo section" in err


def _make_pairs(tmp_path: Path) -> None:
    made = tmp_path / "run" / "3-pairs"
    made.mkdir(parents=True)
    write(made / "pairs.jsonl", map(pair, range(9)))


def test_pairs_that_are_made_are_looked_at(
    waiting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _make_pairs(tmp_path)
    code, out, _ = _run(capsys, "check", "--recipe", waiting)
    assert code == 0
    assert "9 records read as dpo would" in out


def test_a_stage_whose_pairs_are_not_made_is_told(
    waiting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "sft.jsonl", map(conversation, range(9)))
    waiting.write_text(
        waiting.read_text() + f"sft: {{data: {tmp_path}/sft.jsonl, max_length: 400}}\n"
    )
    said = "dpo.data is what its pairs stage makes, and there are none in"
    code, out, err = _run(capsys, "check", "--recipe", waiting)
    assert code == 0
    assert "read as sft would" in out
    assert said in err
    code, out, _ = _run(capsys, "check", "--recipe", waiting, "--json")
    assert code == 0
    assert said in json.loads(out)["notices"][-1]
    code, out, err = _run(capsys, "show", "--recipe", waiting, "--row", 2)
    assert code == 0
    assert said in err
    _make_pairs(tmp_path)
    code, out, err = _run(capsys, "check", "--recipe", waiting, "--json")
    assert code == 0
    assert [one["stage"] for one in json.loads(out)["data"]] == ["sft", "dpo"]
    assert said not in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["check"], "tandem check needs DATA or --recipe"),
        (["show", "--row", "1"], "tandem show needs DATA or --recipe"),
        (["show", "a.jsonl"], "required: --row"),
        (["show", "a.jsonl", "--row", "0"], "0 is not above 0"),
        (["show", "a.jsonl", "--row", "1"], "tandem show needs --model or --recipe"),
        (["show", "a.jsonl", "--row", "1", "--text"], "there is no file or folder a.jsonl"),
        (["check", "a.jsonl", "--model", "./none"], "model folder ./none does not exist"),
        (["check", "a.jsonl", "--recipe", "demoo"], "Did you mean demo?"),
        (["check", "a.jsonl", "--against", "./none"], "there is no file or folder ./none"),
        (
            ["check", "a.jsonl", "--chat_template", "chatml"],
            "--chat_template needs --model or --recipe",
        ),
        (
            ["show", "a.jsonl", "--row", "1", "--text", "--ids"],
            "--text shows the turns alone, and --ids is about tokens",
        ),
        (
            ["show", "a.jsonl", "--row", "1", "--text", "--ids", "--model", "./none"],
            "--text shows the turns alone, and --model and --ids are about tokens",
        ),
        (
            ["show", "--recipe", "demo", "--row", "1", "--text", "--chat_template", "chatml"],
            "--text shows the turns alone, and --chat_template is about tokens",
        ),
        (["check", "a.jsonl", "--limit", "x"], "'x' is not a whole number"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = _run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_a_row_is_shown_with_what_a_run_cuts(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _run(capsys, "show", "--recipe", recipe, "--stage", "sft", "--row", 5)
    assert code == 0
    assert f"{tmp_path}/sft.jsonl, row 5: messages\n" in out
    assert "max_length 420, max_prompt_length 200\n" in out
    assert "\ntruncated: " in out
    assert "\ntrained | " in out
    assert "\nprompt  | " in out


def test_the_turns_are_shown_with_tools_calls_and_reasoning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "Forlì"}}}
    turns = [
        {"role": "user", "content": "Warm?"},
        {"role": "assistant", "content": None, "thinking": "I ask.", "tool_calls": [call]},
        {"role": "tool", "content": "18"},
        {"role": "assistant", "content": "Yes.", "weight": 0},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    row = {"messages": turns, "tools": [{"name": "weather"}]}
    file = write(tmp_path / "a.jsonl", [row])
    code, out, _ = _run(capsys, "show", file, "--row", 1, "--text")
    assert code == 0
    assert out.splitlines()[1:] == [
        "tools:", '  [{"name": "weather"}]',
        "user:", "  Warm?",
        "assistant reasons:", "  I ask.",
        "assistant calls:", '  {"name": "weather", "arguments": {"city": "Forlì"}}',
        "tool:", "  18",
        "assistant (weight 0):", "  Yes.",
        "user:", "  Sure?",
        "assistant:", "  Yes.",
    ]  # fmt: skip


def test_flags_say_what_a_recipe_says_of_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"who": "caller", "said": "Warm?"}, {"who": "host", "said": "Yes."}]
    file = write(tmp_path / "a.jsonl", [{"log": turns}])
    flags = ["--fields", "messages=log", "role=who", "content=said"]
    flags += ["--roles", "caller=user", "host=assistant"]
    code, out, _ = _run(capsys, "check", file, *flags)
    assert code == 0
    assert out.startswith(f"{file}: messages, conversations\n1 record read as sft would: 1 to")
    code, out, _ = _run(capsys, "show", file, "--row", 1, "--text", *flags)
    assert (code, out) == (0, f"{file}, row 1: messages\nuser:\n  Warm?\nassistant:\n  Yes.\n")
    pairs = write(tmp_path / "b.jsonl", [{"prompt": "Q", "completion": "A", "label": True}])
    code, out, _ = _run(capsys, "check", pairs, "--format", "prompt-and-completion")
    assert out.startswith(f"{pairs}: prompt and completion, conversations\nkeys that are not read:")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--format", "sharegtp"], "there is no format 'sharegtp'. Did you mean 'ShareGPT'?"),
        (["--fields", "messages=turns"], "`fields` names 'turns', which no row has"),
        (["--subset", "main"], "a.jsonl"),
    ],
)
def test_flags_about_data_that_mean_nothing_are_refused(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", [conversation(1)])
    for command in (["check"], ["show", "--row", "1", "--text"]):
        code, _, err = _run(capsys, *command, file, *flags)
        assert code == 2
        assert said in err
    code, _, err = _run(capsys, "check", "--recipe", "demo", "--fields", "prompt=question")
    assert (code, err) == (
        2, "error: --fields is about data that is named; name some, or leave it out\n"
    )  # fmt: skip


def test_a_row_of_no_format_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "a.jsonl", ["{"])
    code, out, err = _run(capsys, "show", file, "--row", 1, "--text")
    assert (code, out) == (2, f"{file}, row 1\n")
    assert "row 1: the record is not valid JSON" in err


def test_a_recipe_of_two_stages_is_asked_which(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = _run(capsys, "show", "--recipe", recipe, "--row", 5)
    assert code == 2
    assert "name one with --stage" in err


def test_a_row_that_would_be_dropped_says_why(
    tmp_path: Path, stories_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", [pair(1), {**pair(2), "rejected": pair(2)["chosen"]}])
    for how in (["--text"], ["--model", stories_path]):
        code, out, err = _run(capsys, "show", file, "--row", 2, *how)
        assert code == 2
        assert f"{file}, row 2: explicit preference" in out
        assert "a run would drop this record: identical answers" in err


def test_all_that_a_row_holds_is_shown_and_what_of_it_would_be_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [{"response": "No score"}]
    answers += [{"response": word, "overall_score": n} for n, word in enumerate(("Bad", "Good"))]
    file = write(tmp_path / "a.jsonl", [{"instruction": "Q", "completions": answers}])
    code, out, err = _run(capsys, "show", file, "--row", 1, "--text")
    assert (code, err) == (0, "")
    first, dropped, *turns = out.splitlines()
    assert first == f"{file}, row 1: UltraFeedback"
    assert dropped.startswith("dropped: ")
    assert "score" in dropped
    pair = ["user:", "  Q", "chosen:", "  Good", "rejected:", "  Bad"]
    assert turns == pair
    answers[0]["overall_score"] = -1
    write(file, [{"instruction": "Q", "completions": answers}])
    flags = ["--completions", "best_vs_rest"]
    code, out, err = _run(capsys, "show", file, "--row", 1, "--text", *flags)
    assert (code, err) == (0, "")
    both = [["", f"record {n} of 2", *pair[:5]] for n in (1, 2)]
    both[0].append("  No score")
    both[1].append("  Bad")
    assert out.splitlines()[1:] == [*both[0], *both[1]]


def test_a_recipe_whose_limits_the_model_lacks_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(recipe.read_text().replace("max_length: 420", "max_length: 2000"))
    for argv in (["check"], ["show", "--row", "1"]):
        code, _, err = _run(capsys, *argv, "--recipe", recipe, "--stage", "sft")
        assert code == 2
        assert "exceeds the context of" in err


def _in_a_terminal(argv: list[object], width: int = 100) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    environment: dict[str, Any] = {**os.environ, "COLUMNS": str(width), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [python(), "-m", "tandem", *map(str, argv)],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(ours)
    _, err = process.communicate()
    assert process.returncode == 0, err.decode()
    return written.decode()


def test_a_terminal_has_colours(tmp_path: Path, stories_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", map(pair, range(5)))
    shown = _in_a_terminal(["show", file, "--row", 2, "--model", stories_path])
    assert "\x1b[" in shown
    assert " | " not in shown
    assert "what both answers share" in shown
