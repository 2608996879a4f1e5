"""The seed's three commands on a real pretrained model and real data, and a whole recipe."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tandem.cli.main import main
from tandem.storage.atomic_files import read_json, read_jsonl


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def conversations(some_data: Path, tmp_path: Path) -> Path:
    """Every fortieth of the real conversations."""
    lines = (some_data / "conversations" / "slimorca_format.jsonl").read_text().splitlines()
    path = tmp_path / "conversations.jsonl"
    path.write_text("\n".join(lines[::40]) + "\n")
    return path


@pytest.fixture
def pairs(some_data: Path, tmp_path: Path) -> Path:
    """Every third of the real pairs."""
    lines = (some_data / "pairs" / "orca_dpo_pairs.jsonl").read_text().splitlines()
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines[::3]) + "\n")
    return path


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(folder / "metrics.jsonl")]


def test_the_tutorial_in_its_own_flags(
    some_model: Path,
    conversations: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sft, merged, dpo, final = (tmp_path / name for name in ("sft", "merged", "dpo", "final"))
    flags = [
        "sft", "--model_name_or_path", some_model, "--dataset_name", conversations,
        "--output_dir", sft, "--per_device_train_batch_size", 1,
        "--gradient_accumulation_steps", 4, "--learning_rate", "2e-3", "--max_steps", 6,
        "--logging_steps", 2, "--lora_rank", 16, "--lora_alpha", 64, "--lora_dropout", 0.05,
        "--max_seq_length", 512, "--max_prompt_length", 256, "--warmup_ratio", 0.03, "--bf16",
        "--use_habana", "--use_lazy_mode",
    ]  # fmt: skip
    assert main([str(flag) for flag in flags]) == 0
    said = capsys.readouterr()
    assert "truncated" in said.out + said.err
    assert _losses(sft)[-1] < _losses(sft)[0]
    ledger = read_jsonl(sft / "data-ledger.jsonl")
    counts = read_json(sft / "summary.json")["ledger"]
    assert counts["truncated"] == sum(line["outcome"] == "truncated" for line in ledger) > 0
    assert counts["read"] == counts["trained"] + counts["dropped"]

    def merge(base: Path, adapter: Path, output: Path) -> None:
        flags = ["--base-model-path", base, "--lora-model-path", adapter, "--output-path", output]
        assert main(["merge", *map(str, flags)]) == 0

    merge(some_model, sft, merged)
    flags = [
        "dpo", "--model_name_or_path", merged, "--output_dir", dpo,
        "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1,
        "--learning_rate", "1e-3", "--max_steps", 3, "--save_steps", 10, "--logging_steps", 1,
        "--lora_alpha", 16, "--lora_rank", 16, "--lora_dropout", 0.05,
        "--dataset_name", pairs, "--bf16",
        "--max_length", 512, "--max_prompt_length", 256, "--lr_scheduler_type", "cosine",
        "--warmup_steps", 1, "--use_habana", "--use_lazy_mode", "--pad_max", "true",
        "--gradient_checkpointing", "true", "--lora_all_linear", "false",
        "--lora_target_modules", "k_proj", "q_proj", "v_proj",
    ]  # fmt: skip
    assert main([str(flag) for flag in flags]) == 0
    assert _losses(dpo)[-1] < _losses(dpo)[0] < 0.7
    merge(merged, dpo, final)
    assert "error" not in capsys.readouterr().err
    _answers_with_its_template(final)
    monkeypatch.setattr("sys.stdin", StringIO("Who are you?\n/quit\n"))
    monkeypatch.setattr("sys.stdout", StringIO())
    said = sys.stdout
    assert main(["chat", str(final), "--max-new-tokens", "8", "--temperature", "0"]) == 0
    assert isinstance(said, StringIO)
    assert "Chat with final" in said.getvalue()


def test_the_tutorials_own_lengths_exceed_this_models_context(
    some_model: Path, conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_name_or_path", some_model, "--dataset_name", conversations]
    for stage, length in (("sft", 2560), ("dpo", 1536)):
        assert main([stage, *map(str, flags), "--output_dir", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert f"max_length {length} exceeds the context of {some_model}, 512 tokens" in said
    assert not (tmp_path / "out").exists()


def _answers_with_its_template(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who are you?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    output = model.generate(**prompt, max_new_tokens=5, do_sample=False, pad_token_id=2)
    assert output.shape[1] > prompt["input_ids"].shape[1]


def _recipe(tmp_path: Path, some_model: Path, conversations: Path) -> Path:
    """A small whole recipe over a few of the conversations, short enough to be repeated."""
    rows = []
    for line in conversations.read_text().splitlines():
        turns = json.loads(line)["conversations"]
        question, answer = turns[-2]["value"], turns[-1]["value"]
        if 0 < len(question) + len(answer) < 300 and len(turns) < 4:
            rows.append({"question": question, "answer": answer, "accepted": [answer.split()[0]]})
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    short = {
        "batch_size": 2, "max_steps": 2, "save_steps": 1, "learning_rate": 1e-3,
        "max_length": 256, "max_prompt_length": 128, "lora": {"rank": 4, "alpha": 8},
    }  # fmt: skip
    recipe: dict[str, Any] = {
        "name": "small",
        "model": str(some_model),
        "output_dir": str(tmp_path / "run"),
        "sft": {**short, "data": str(conversations)},
        "pairs": {
            "prompts": str(questions), "heldout": str(questions), "max_new_tokens": 5,
            "keep": "different",
        },
        "dpo": short,
        "evaluate": {"questions": str(questions), "max_new_tokens": 5},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def test_a_whole_recipe_in_one_go_and_in_pieces(
    some_model: Path,
    conversations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = _recipe(tmp_path, some_model, conversations)
    assert main(["run", str(recipe)]) == 0
    run = tmp_path / "run"
    whole = load_file(run / "5-final" / "model.safetensors")
    evaluation = read_json(run / "6-evaluation" / "evaluation.json")
    assert evaluation["models"].keys() == {"base", "sft", "dpo"}
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert "small" in (run / "5-final" / "README.md").read_text()
    chain = read_json(run / "manifest.json")["stages"]
    assert all(stage["status"] == "finished" for stage in chain.values())
    assert len(chain) == 6

    def state() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}

    before = state()
    assert main(["run", str(recipe)]) == 0
    assert state() == before
    capsys.readouterr()
    assert main(["run", str(recipe), "dpo.beta=0.5"]) == 2
    assert "settings.beta: 0.1 -> 0.5" in capsys.readouterr().err

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other-cache"))
    other = f"output_dir={tmp_path / 'pieces'}"
    assert main(["run", str(recipe), other, "--until", "pairs"]) == 0
    assert main(["run", str(recipe), other, "--from", "evaluate"]) == 2
    assert main(["run", str(recipe), other, "--from", "dpo"]) == 0
    pieces = load_file(tmp_path / "pieces" / "5-final" / "model.safetensors")
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)
