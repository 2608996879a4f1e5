"""A tokenizer with more tokens than the model has rows: said before training, never a score."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tandem.cli.main import main
from tandem.data.tokenize.vocabulary import add_tokens
from tandem.errors import UserError
from tandem.evaluate import harness
from tandem.evaluate.eval_model import find_eval_model
from tandem.evaluate.harness_tasks import TaskSettings, harness_model
from tandem.integrations.choose import choose_device
from tandem.storage.atomic_files import atomic_write_json, read_json

from .desk import Desk

END = "<|im_end|>"


@pytest.fixture
def rows(desk: Desk) -> int:
    """The rows of a model whose tokenizer has one token more: the id of that token."""
    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    count = len(tokenizer)
    add_tokens(tokenizer, [END])
    tokenizer.save_pretrained(desk.model)
    return count


def spoil(path: Path, row: int, key: str) -> None:
    """Put the token into a text of a row."""
    lines = path.read_text().splitlines()
    record = json.loads(lines[row - 1])
    if key == "conversations":
        record[key][0]["value"] += END
    else:
        record[key] += END
    lines[row - 1] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n")


def test_records_that_never_use_the_token_train_and_a_line_says_so(desk: Desk, rows: int) -> None:
    said = " ".join(desk.accepted(desk.train(max_steps=1)).split())
    assert f"1 more tokens than the model has rows for, {rows}: '{END}' ({rows})" in said


def test_a_record_that_uses_it_is_refused_with_token_id_and_rows(desk: Desk, rows: int) -> None:
    spoil(desk.conversations, 7, "conversations")
    needles = ("conversations.jsonl, row 7", f"'{END}' has the id {rows}", f"{rows} rows")
    desk.refused(desk.train(), *needles, "added_tokens")
    model = ["--model", str(desk.model)]
    desk.refused(["check", str(desk.conversations), *model], *needles)
    desk.refused(["show", str(desk.conversations), "--row", "7", *model], *needles)
    recipe = desk.recipe()
    for argv in (["run", recipe], ["run", recipe, "--dry-run"], ["plan", recipe]):
        desk.refused(argv, *needles)


def test_a_target_alone_and_the_pairs_of_a_later_stage_are_refused(desk: Desk, rows: int) -> None:
    spoil(desk.pairs, 3, "rejected")
    needles = ("pairs.jsonl, row 3", f"'{END}' has the id {rows}")
    desk.refused(desk.train("dpo"), *needles)
    desk.refused(["run", desk.recipe()], *needles)  # before the first stage


def test_a_template_that_writes_it_is_refused_at_once(desk: Desk, rows: int) -> None:
    for stage in ("sft", "dpo"):
        desk.refused(desk.train(stage, chat_template="chatml"), END)
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}" + END + "{% endfor %}"
    template = desk.text(source, "end.jinja")
    needle = f"'{END}' has the id {rows}, and the model has {rows} rows"
    for stage in ("sft", "dpo"):
        desk.refused(desk.train(stage, chat_template=template), needle)
    held = ["eval", str(desk.model), "--heldout", str(desk.conversations), "--output_dir", "e"]
    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    tokenizer.chat_template = source
    tokenizer.save_pretrained(desk.model)
    desk.stopped(held, needle)  # once a score: the log-prob of no token at all
    desk.refused(["check", str(desk.pairs), "--model", str(desk.model)], needle)


def test_an_evaluation_names_the_record(desk: Desk, rows: int) -> None:
    spoil(desk.conversations, 7, "conversations")
    needles = ("conversations.jsonl, row 7", f"'{END}' has the id {rows}")
    held = ["eval", str(desk.model), "--heldout", str(desk.conversations), "--output_dir", "e"]
    desk.stopped(held, *needles)
    question = {"question": f"What{END}?", "answer": "one", "accepted": ["one"]}
    questions = desk.text(json.dumps(question) + "\n", "questions.jsonl")
    held[2:4] = ["--questions", questions]
    desk.stopped(held, "questions.jsonl, row 1", f"'{END}' has the id {rows}")


def test_a_chat_says_it_and_goes_on(desk: Desk, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", StringIO(f"say{END}\nsay red\n"))
    assert main(["chat", str(desk.model), "--max_new_tokens", "2", "--temperature", "0"]) == 0
    said = " ".join(desk.capsys.readouterr().out.split())
    assert f"has the id {rows}" in said
    assert "cut after 2 tokens" in said


def test_prompts_of_the_pairs_stage_are_refused(desk: Desk, rows: int) -> None:
    spoil(desk.conversations, 7, "conversations")
    pairs = {"prompts": str(desk.conversations), "max_new_tokens": 4}
    recipe = desk.recipe(pairs=pairs, sft=None, dpo__data=[])
    desk.stopped(["run", recipe, "--until", "pairs"], "row 7", f"'{END}' has the id {rows}")


def test_an_end_token_that_was_never_trained_is_a_warning_everywhere(desk: Desk) -> None:
    weights = load_file(desk.model / "model.safetensors")
    weights["lm_head.weight"][[1, 40, 41, 200]] = torch.ones(32)
    save_file(weights, desk.model / "model.safetensors", metadata={"format": "pt"})
    needle = "the model cannot learn to stop: answers end with '</s>'"

    def said(argv: list[str]) -> str:
        assert main(argv) == 0
        captured = desk.capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    assert needle in said(["check", str(desk.pairs), "--model", str(desk.model)])
    recipe = desk.recipe()
    assert needle in said(["plan", recipe])
    assert needle in said(["run", recipe, "--until", "sft"])
    said(["report", str(desk.home / "run")])
    assert "the model cannot learn to stop" in (desk.home / "run" / "report.html").read_text()
    for stage in ("sft", "dpo"):
        assert needle in said(desk.train(stage, max_steps=1, output_dir=desk.home / stage))
    named = desk.recipe(added_tokens=["</s>"])
    assert needle not in said(["plan", named])
    # A head of which every row is trained can learn it.
    full = desk.recipe(output_dir=str(desk.home / "full"), sft__full=True, dpo__full=True)
    assert needle not in said(["check", "--recipe", full])
    assert needle not in said(["plan", full])
    assert needle not in said(["run", full])
    assert "tandem chat" in (desk.home / "full" / "4-dpo" / "README.md").read_text()


def test_padding_beyond_the_rows_is_refused(desk: Desk) -> None:
    config = read_json(desk.model / "config.json")
    rows = config["vocab_size"]
    atomic_write_json(desk.model / "config.json", {**config, "pad_token_id": rows})
    needle = f"config.json has pad_token_id {rows}, and the model has {rows} rows"
    for argv in (
        desk.train(), desk.train("dpo"), ["plan", desk.recipe()], ["run", desk.recipe()],
        ["chat", str(desk.model)], ["check", str(desk.pairs), "--model", str(desk.model)],
    ):  # fmt: skip
        desk.refused(argv, needle)


def test_the_harness_refuses_texts_with_the_token(desk: Desk, rows: int) -> None:
    from transformers import AutoModelForCausalLM

    class Theirs:
        model = AutoModelForCausalLM.from_pretrained(desk.model)
        tok_encode = staticmethod(AutoTokenizer.from_pretrained(desk.model).encode)
        tok_batch_encode = None

    theirs = Theirs()
    model = find_eval_model("base", str(desk.model))
    tokenizer, _ = model.tokenizer(None)
    settings = TaskSettings(limit=None, chat=False, batch_size="1", chat_template=None)
    subject = harness_model(model, tokenizer, settings, choose_device("cpu", "float32"))
    assert subject.check is not None
    harness._check_tokens(theirs, subject.check)
    assert theirs.tok_encode("say red")
    with pytest.raises(UserError, match=f"has the id {rows}"):
        theirs.tok_encode(f"say {END}")
