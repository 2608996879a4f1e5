"""`tandem rehearse`: what it shows, what it finds, and that it leaves the run alone."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tandem.cli.main import main

from ..faults.desk import Desk
from ..stages.made_inputs import WORDS, make_conversations, make_model_folder, make_pairs

ENDLESS = """\
{%- for message in messages -%}
{{- message['role'] + ': ' + message['content'] + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}
"""


@pytest.fixture(scope="module")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def desk(
    tmp_path: Path,
    _model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Desk:
    """A sound model, conversations and pairs; temporary folders are made in `tmp_path / "tmp"`."""
    home = tmp_path / "home"
    shutil.copytree(_model, home / "model")
    make_conversations(home / "conversations.jsonl", 200)
    make_pairs(home / "pairs.jsonl", 60)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(home)
    return Desk(home, capsys)


def rehearsed(desk: Desk, recipe: str, *flags: str, code: int) -> str:
    """What a rehearsal printed, its lines joined and without the times."""
    ended = main(["rehearse", recipe, *flags])
    captured = desk.capsys.readouterr()
    assert ended == code, captured.out + captured.err
    assert "Traceback" not in captured.err
    out = re.sub(r"(?m)^([✓✗] .{13}) +[\d.]+ m?s  ", r"\1 ", captured.out)
    return " ".join(out.split())


def left(desk: Desk) -> list[str]:
    """The rehearsals whose files are still there."""
    return [path.name for path in (desk.home.parent / "tmp").iterdir()]


def test_a_sound_recipe_is_shown_stage_by_stage_and_nothing_of_the_run_is_written(
    desk: Desk,
) -> None:
    questions = desk.home / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"question": f"say {w}", "answer": w}) + "\n" for w in WORDS)
    )
    before = set(desk.home.rglob("*"))
    recipe = desk.recipe(
        dtype="bfloat16", sft__warmup_steps=50, sft__validation={"fraction": 0.1},
        pairs={"prompts": str(questions), "samples": 2, "temperature": 0.9,
               "filters": {"language": "same"}},
        dpo__data=[], dpo__max_steps=None, dpo__epochs=3,
        evaluate={"questions": str(questions)},
    )  # fmt: skip
    said = rehearsed(desk, recipe, code=0)
    for shown in (
        "✓ model LlamaForCausalLM, 2 of 2 layers",
        "✓ template neural-chat, 287 tokens; an answer ends with </s> (1)",
        "✓ sft data 48 of 200 rows of conversations.jsonl: 48 trained, 0 cut, 0 dropped; "
        "</s> is trained in 48 of 48",
        "✓ pairs data prompts: 10 of 10 rows of questions.jsonl, 10 usable",
        "✓ sft 4 steps, loss",
        "stopped after step 2 and resumed",
        "✓ sft-merge 14 weights merged, compared layer by layer",
        "✓ pairs 6 pairs from 6 prompts",
        "✓ dpo before the first step the policy equals the reference; 4 steps",
        "✓ evaluate base, sft, dpo measured on 2 questions",
        "✓ report",
        "✓ export a GGUF file computes, cuts texts and ends answers as the model does",
        "sft.warmup_steps: 50 -> 1",
        "dtype: bfloat16 -> auto",
        "dpo.max_steps: null -> 4",
        "not shown: memory and speed",
        "pairs.filters.language on real answers",
        "nothing failed in",
    ):
        assert shown in said, said
    assert set(desk.home.rglob("*")) - before == {Path(recipe)}
    assert left(desk) == []


def test_three_planted_mistakes_are_found_at_once_each_with_its_stage_and_mend(
    desk: Desk,
) -> None:
    (desk.home / "endless.jinja").write_text(ENDLESS)
    pairs = desk.home / "no-prompts.jsonl"
    rows = [{"chosen": f"{w} it is", "rejected": "no"} for w in WORDS]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = desk.recipe(
        chat_template="endless.jinja", dpo__data=str(pairs),
        sft__lora={"target_modules": ["q_proj", "query"]},
    )  # fmt: skip
    said = rehearsed(desk, recipe, code=2)
    assert "✗ sft sft.lora.target_modules" in said
    assert "✗ sft data chat template 'endless.jinja' does not end an answer with a token" in said
    assert "Choose another `chat_template`" in said
    assert f"✗ dpo data data: none of the {len(rows)} records of {pairs} can be trained" in said
    assert f"{pairs}, row 1: `chosen` is neither messages nor a transcript" in said
    assert "– sft not reached – sft-merge not reached" in said
    assert "3 mistakes found" in said
    assert len(left(desk)) == 1  # what failed can be looked at


@pytest.mark.parametrize(
    ("changes", "stage", "said"),
    [
        ({"chat_template": "ENDLESS"}, "sft data", "does not end an answer"),
        ({"sft__lora": {"target_modules": ["query"]}}, "sft", "sft.lora.target_modules"),
        ({"dpo__data": "NO PROMPTS"}, "dpo data", "`chosen` is neither messages nor"),
        ({"sft__max_length": 257}, "sft", "sft.max_length 257 exceeds the context"),
        ({"sft__data": "LONG", "sft__max_length": 250}, "sft data", "the end token </s> trained"),
        ({"model": "nowhere/"}, "model", "does not exist"),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained(
    desk: Desk, changes: dict[str, Any], stage: str, said: str
) -> None:
    if changes.get("chat_template") == "ENDLESS":
        (desk.home / "own.jinja").write_text(ENDLESS)
        changes = {"chat_template": "own.jinja"}
    if "dpo__data" in changes:
        (desk.home / "bare.jsonl").write_text('{"chosen": "one", "rejected": "two"}\n' * 9)
        changes = {"dpo__data": str(desk.home / "bare.jsonl")}
    if changes.get("sft__data") == "LONG":
        row = {"instruction": "say red", "output": "red green " * 100}
        (desk.home / "long.jsonl").write_text((json.dumps(row) + "\n") * 9)
        changes["sft__data"] = str(desk.home / "long.jsonl")
    found = rehearsed(desk, desk.recipe(**changes), code=2)
    assert f"✗ {stage} " in found, found
    assert said in found.partition(f"✗ {stage} ")[2], found


def test_records_are_spread_over_the_data_and_named_as_the_users(desk: Desk) -> None:
    lines = desk.conversations.read_text().splitlines()
    lines[-1] = lines[-1][:-2]  # the end of a file that was cut
    desk.conversations.write_text("\n".join(lines) + "\n")
    said = rehearsed(desk, desk.recipe(dpo=None), code=2)
    assert f"✗ sft data {desk.conversations}, row 200: the record is not valid JSON" in said
    assert "✓ model" in said
    said = rehearsed(desk, desk.recipe(dpo=None, sft__on_bad_record="drop"), "--keep", code=0)
    assert "47 trained, 0 cut, 1 dropped" in said
    (kept,) = [name for name in left(desk) if f"files: {tempfile.tempdir}/{name}" in said]
    run = Path(str(tempfile.tempdir), kept, "run")
    assert (run / "2-sft-merged" / "model.safetensors").exists()
    # Of the real run there is nothing that could be taken for a finished stage.
    assert not (desk.home / "run").exists()


def test_a_server_that_is_not_there_is_found_or_left_out(desk: Desk) -> None:
    judge = {"base_url": "http://127.0.0.1:9/v1", "model": "judge"}
    recipe = desk.recipe(
        sft=None, dpo__data=[], chat_template="chatml", added_tokens=["<|im_start|>", "<|im_end|>"],
        pairs={"prompts": str(desk.conversations), "samples": 2, "rank": {"judge": judge}},
    )  # fmt: skip
    said = rehearsed(desk, recipe, code=2)
    assert "✗ pairs pairs.rank.judge: http://127.0.0.1:9/v1" in said
    assert "--without-servers" in said
    said = rehearsed(desk, recipe, "--without-servers", "--steps", "1", code=0)
    assert "pairs.rank.judge: the server was not asked" in said
    assert "stopped after step" not in said  # one step has no half


def test_rounds_callbacks_and_trackers_are_rehearsed_or_said_not_to_be(desk: Desk) -> None:
    (desk.home / "own_watch.py").write_text(
        "def nervous(event):\n    return 'stop' if event.step == 3 else None\n"
        "def broken(event):\n    return event.metrics['no such thing']\n"
    )
    questions = desk.home / "questions.jsonl"
    rows = [{"question": f"say {w}", "answer": w} for w in WORDS]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = desk.recipe(
        sft=None, dpo__data=[], dpo__samples={"prompts": "say red"}, rounds=4,
        pairs={"prompts": str(questions), "parts": 5, "samples": 2, "temperature": 0.9},
        callbacks="own_watch:nervous", trackers="tensorboard", chat_template="neural-chat",
    )  # fmt: skip
    said = rehearsed(desk, recipe, code=0)
    for shown in (
        "rounds: 4 -> 2",
        "✓ dpo-2 before the first step the policy equals the reference; 4 steps",
        "a callback asked for a stop, and the stage was resumed",
        "trackers: tensorboard, but for their login",
        "✓ dpo-merge-2",
    ):
        assert shown in said, said
    said = rehearsed(desk, recipe, "rounds=1", "callbacks=own_watch:missing", code=2)
    assert "✗ settings callbacks: own_watch has no missing" in said
    said = rehearsed(desk, recipe, "rounds=1", "callbacks=own_watch:broken", code=2)
    assert "✗ dpo" in said
    assert "KeyError" in said


def test_a_model_that_gguf_lacks_is_noted_and_fails_nothing(desk: Desk) -> None:
    config = json.loads((desk.home / "model" / "config.json").read_text())
    config["hidden_act"] = "relu"
    (desk.home / "model" / "config.json").write_text(json.dumps(config))
    said = rehearsed(desk, desk.recipe(dpo=None), code=0)
    assert "tandem export gguf would refuse this model" in said
    assert "nothing failed in" in said
