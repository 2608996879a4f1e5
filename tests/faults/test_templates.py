"""Templates that leave out what they are given: said before the first step, in every command."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from .desk import Desk

# As many plain templates do, it passes over whoever is neither user nor assistant.
DEAF = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n"
    "{% elif m.role == 'assistant' %}A: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
OMITTED = "the chat template does not render the system turn"


@pytest.fixture
def deaf(desk: Desk) -> str:
    return desk.text(DEAF, "deaf.jinja")


def lines(desk: Desk, name: str, *rows: dict[str, str]) -> str:
    return desk.text("".join(json.dumps(row) + "\n" for row in rows), name)


def test_training_drops_what_would_lose_its_system_turn(desk: Desk, deaf: str) -> None:
    said = [{"system": "S", "prompt": "red", "completion": "green"}] * 3
    data = lines(desk, "system.jsonl", *said, {"prompt": "red", "completion": "green"})
    desk.refused(
        desk.train(dataset_name=lines(desk, "all.jsonl", *said), chat_template=deaf),
        f"{OMITTED}: 3", "row 1", "deaf.jinja", "Choose another `chat_template`",
    )  # fmt: skip
    desk.refused(
        desk.train(dataset_name=data, chat_template=deaf),
        "3 of 4 records would be dropped", f"3 x {OMITTED}", "choose another `chat_template`",
    )  # fmt: skip
    text = desk.accepted([*desk.train(dataset_name=data, chat_template=deaf), "--max_dropped", "1"])
    assert "1 of 4 records to train on, 0 truncated, 3 dropped" in text
    assert f"3 x {OMITTED}" in text
    pairs = [{"system": "S", "prompt": "red", "chosen": "green", "rejected": "blue"}] * 2
    desk.stopped(
        desk.train("dpo", dataset_name=lines(desk, "dpo.jsonl", *pairs), chat_template=deaf,
                   output_dir=desk.home / "dpo"),
        f"{OMITTED}: 2",
    )  # fmt: skip


def test_check_and_show_say_the_same(
    desk: Desk, deaf: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from tandem.cli.main import main

    row = {"system": "S", "prompt": "red", "completion": "green"}
    data = lines(desk, "system.jsonl", row, {"prompt": "red", "completion": "green"})
    model = ["--model", str(desk.model), "--chat_template", deaf]
    assert main(["check", data, "--json", *model]) == 2  # more than max_dropped
    (looked,) = json.loads(capsys.readouterr().out)["data"]
    (finding,) = (one for one in looked["findings"] if one["name"] == "dropped")
    assert (finding["about"], finding["count"], finding["severity"]) == (OMITTED, 1, "error")
    assert finding["hint"].startswith("Choose another `chat_template`")
    assert main(["show", data, "--row", "1", *model]) == 2
    assert f"dropped: {OMITTED}" in capsys.readouterr().out


def test_questions_are_looked_at_before_the_first_stage(desk: Desk, deaf: str) -> None:
    asked = {"question": "say red", "answer": "red"}
    questions = lines(desk, "questions.jsonl", asked, {**asked, "system": "S"})
    recipe = desk.recipe(chat_template=deaf, evaluate={"questions": questions})
    desk.refused(["run", recipe], "questions.jsonl, row 2", OMITTED, "deaf.jinja")
    # The base is asked in a template of its own.
    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    tokenizer.chat_template = DEAF
    tokenizer.save_pretrained(desk.model)
    recipe = desk.recipe(chat_template="zephyr", evaluate={"questions": questions})
    desk.refused(["run", recipe], "questions.jsonl, row 2", OMITTED, "the model's own")
    desk.stopped(
        ["eval", str(desk.model), "--questions", questions, "--output_dir", "e"],
        "questions.jsonl, row 2", OMITTED,
    )  # fmt: skip
