"""The base model that ships in the package: small, loadable, and it knows its facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.demo.corpus import train_tokenizer
from tandem.demo.embedded import materialise
from tandem.demo.facts import all_facts
from tandem.demo.pretrain import Plan, build_model, completion_accuracy, pretrain, schedule


@pytest.fixture(scope="module")
def folder() -> Path:
    return materialise("demo:base", Path(), 0)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_the_folder_is_small_and_half_precision(folder: Path) -> None:
    from safetensors import safe_open

    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} <= {"BF16", "F16"}


def test_the_base_completes_its_facts(folder: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.model_type == "mistral"
    assert completion_accuracy(model, tokenizer, all_facts()[::6]) > 0.9


def test_the_tokenizer_writes_the_chat_format_and_has_no_template(tokenizer: Any) -> None:
    text = "<s>### System:\nA.</s>\n### User:\nWas heißt „ja“?</s>\n### Assistant:\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.unk_token_id not in ids
    assert tokenizer("Hello")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.chat_template is None
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)


def test_training_follows_its_seed(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(steps=2, minutes=None, rows=2, row_length=64, seed=5)
    models = [build_model(tokenizer, plan.seed) for _ in range(2)]
    start = models[0].state_dict()["model.norm.weight"].clone()
    for model in models:
        pretrain(model, tokenizer, plan)
    first, again = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.norm.weight"], start)
    assert "loss" in capsys.readouterr().out


def test_the_tokenizer_in_the_folder_is_the_one_the_script_makes(tokenizer: Any) -> None:
    assert train_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_schedule_rises_and_falls() -> None:
    assert schedule(0.0) == 0.0
    assert schedule(0.03) == pytest.approx(1.0)
    assert schedule(1.0) == pytest.approx(0.02)
