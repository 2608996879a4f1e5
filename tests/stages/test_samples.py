"""Answers to fixed prompts on the way are those of the checkpoint, and change nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

from tandem.cli.main import main
from tandem.errors import UserError
from tandem.model.generate import Sampling, generate_answers
from tandem.model.load_model import load_adapter, load_model
from tandem.recipe.data_source import DataSource
from tandem.recipe.samples_settings import SamplesSettings
from tandem.recipe.training_settings import SftSettings
from tandem.report.html import write_report
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.train.engines.spread_model import SpreadModel
from tests.jobs import training_job

from .made_inputs import QUIET, make_conversations
from .stopped import dying_before
from .test_training_stages import run, settings
from .test_validation import same

ASKED = ("say red", "say blue one\ntwo")
LONG: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "learning_rate": 3e-2}


def sampled(folder: Path) -> SamplesSettings:
    questions = folder / "questions.jsonl"
    row = {"system": "Count.", "question": "say sun", "answer": "sun"}
    questions.write_text(json.dumps(row) + "\n")
    return SamplesSettings(
        prompts=ASKED, questions=(DataSource(path=str(questions)),), max_new_tokens=12
    )


def greedy(model: Any, folder: Path, turns: list[dict[str, str]]) -> str:
    """What transformers' own generate writes, with the tokenizer and template that were saved."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(
        **ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )  # fmt: skip
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize(
    ("kind", "changes", "runtime"),
    [
        ("sft", {"gradient_checkpointing": True, "neftune_alpha": 5.0, "ema_decay": 0.5}, {}),
        ("dpo", {}, {"attention": "padded"}),
    ],
)
def test_they_are_those_of_the_checkpoint_and_change_nothing(
    kind: str, changes: Any, runtime: Any, tiny_model: Path, tmp_path: Path
) -> None:
    values = LONG | changes
    plain = run(kind, tiny_model, tmp_path / "plain", runtime=runtime, **values)
    samples, out = sampled(tmp_path), tmp_path / "out"
    asked = run(kind, tiny_model, out, runtime=runtime, samples=samples, **values)
    assert same(asked, plain)
    lines = read_jsonl(out / "samples.jsonl")
    assert [(line["step"], line["number"]) for line in lines] == [
        (step, number) for step in (0, 2, 4) for number in (0, 1, 2)
    ]
    assert [line["prompt"] for line in lines[:3]] == [*ASKED, "say sun"]
    assert (lines[2]["system"], "system" in lines[0]) == ("Count.", False)
    user = [{"role": "user", "content": ASKED[0]}]
    system = [{"role": "system", "content": "Count."}, {"role": "user", "content": "say sun"}]
    base = load_model(tiny_model, dtype=torch.float32, device=torch.device("cpu"))
    for number, turns in ((0, user), (2, system)):
        assert lines[number]["answer"] == greedy(base, out, turns).strip()
    trained = load_adapter(base, out)
    for number, turns in ((0, user), (2, system)):
        assert lines[6 + number]["answer"] == greedy(trained, out, turns).strip()
    assert lines[0]["answer"] != lines[6]["answer"]
    summary = read_json(out / "summary.json")["samples"]
    assert summary["prompts"] == 3
    assert summary["seconds"] > 0
    assert "samples.jsonl" in read_json(out / "manifest.json")["outputs"]
    page = write_report(out).read_text()
    told = page.partition("<h3>Answers on the way</h3>")[2]
    assert told.count("<article") == 3
    for line in lines:
        assert f'<td class="n">{line["step"]}</td>' in told


def test_all_weights(tiny_model: Path, tmp_path: Path) -> None:
    data = make_conversations(tmp_path / "sft.jsonl")
    values = settings("sft", data, **LONG).model_dump(exclude={"lora"}, exclude_unset=True)
    found = []
    for name, samples in (("asked", sampled(tmp_path)), ("plain", None)):
        full = SftSettings(**values, full=True, samples=samples)
        folder = run_sft(training_job(full, tiny_model, tmp_path / name), QUIET)
        found.append(load_file(folder / "model.safetensors"))
    assert same(*found)
    lines = read_jsonl(tmp_path / "asked" / "samples.jsonl")
    model = load_model(tmp_path / "asked", dtype=torch.float32, device=torch.device("cpu"))
    user = [{"role": "user", "content": ASKED[0]}]
    assert lines[-3]["answer"] == greedy(model, tmp_path / "asked", user).strip()


def test_a_run_that_died_has_each_answer_once(tiny_model: Path, tmp_path: Path) -> None:
    values = {**LONG, "samples": sampled(tmp_path)}
    run("sft", tiny_model, tmp_path / "whole", **values)
    whole = read_jsonl(tmp_path / "whole" / "samples.jsonl")
    with dying_before(3):
        run("sft", tiny_model, tmp_path / "out", **values)
    # As of a run that died between its answers and their checkpoint.
    with (tmp_path / "out" / "samples.jsonl").open("a") as file:
        file.write(json.dumps({**whole[-1], "answer": "too early"}) + "\n")
    run("sft", tiny_model, tmp_path / "out", **values)
    assert read_jsonl(tmp_path / "out" / "samples.jsonl") == whole


def test_what_cannot_be_asked_is_told_before_training(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(said: str, **samples: Any) -> None:
        with pytest.raises(UserError, match=said):
            run("sft", tiny_model, tmp_path / "out", samples=SamplesSettings(**samples))
        assert not (tmp_path / "out").exists()

    refused(r"samples\.prompts, number 2: \d+ tokens and an answer of .* 64 exceed the model's "
            "context of 256", prompts=("a", "red " * 300))  # fmt: skip
    (tmp_path / "q.jsonl").write_text('{"question": "no answer"}\n')
    refused(r"q\.jsonl, row 1: no usable question", questions=(str(tmp_path / "q.jsonl"),))
    recipe = tmp_path / "r.yaml"
    data = make_conversations(tmp_path / "c.jsonl")
    text = f"name: r\nmodel: {tiny_model}\noutput_dir: {tmp_path / 'run'}\n"
    text += f"chat_template: neural-chat\nsft: {{data: {data}, max_length: 128, samples: SECTION}}"
    for section, said in (
        ("{}", "sft.samples: name prompts or questions"),
        ("{prompts: hello, max_token: 3}", "did you mean sft.samples.max_new_tokens"),
        ("{questions: none.jsonl}", "none.jsonl"),
    ):
        recipe.write_text(text.replace("SECTION", section))
        assert main(["run", str(recipe)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "1-sft").exists()


def test_a_model_that_keeps_state_is_refused_where_its_weights_are_spread() -> None:
    class Mamba(torch.nn.Module):
        _is_stateful, device = True, torch.device("cpu")

    def refuse(error: UserError) -> NoReturn:
        raise error

    spread = SpreadModel(Mamba(), lambda work: work(), refuse)
    with pytest.raises(UserError, match="samples: Mamba keeps state of its own across tokens"):
        generate_answers(spread, [[1, 2]], stop_ids=[0], sampling=Sampling(4))
