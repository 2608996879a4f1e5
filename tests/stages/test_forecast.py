"""Estimates of a stage that is about to begin, and what the next plan learns from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from tandem.integrations.choose import choose_device
from tandem.model.cpu.onednn_linear import bytes_to_order, order_weights, ordered_bytes
from tandem.model.load_model import load_model
from tandem.model.logprobs.output_head import order_head
from tandem.model.lora.adapter import LoraWeights
from tandem.pipeline.default_callbacks import default_callbacks
from tandem.plan.model_shape import described
from tandem.plan.rate import recorded_rate
from tandem.plan.stage_estimate import (
    StageEstimate,
    StageSetup,
    compare,
    copied_bytes,
    remember_run,
)
from tandem.plan.workload import Workload
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.training_settings import LoraSettings, SftSettings
from tandem.stages.sft import run_sft
from tandem.stages.training import context
from tandem.storage.atomic_files import read_json
from tests.jobs import training_job

from .made_inputs import QUIET, make_conversations, make_model_folder

_SMALL: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
_WORK = Workload(
    records=10, steps=5, examples=20, tokens=400, tokens_per_epoch=200, padded_tokens=500,
    shared_tokens=0, targets=100, visible=4e3, longest=30, packed_steps=5, micro_batches=10,
    fill=0.5, imbalance=1.6, largest=60, reference_tokens=200, reference_targets=50,
    reference_visible=2e3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _forecast(device: str) -> StageEstimate:
    config = LlamaConfig(**_SMALL)
    shape = described(config, LoraSettings(rank=4, alpha=8), attention="auto").shape
    # Of another device than the one that is here only its kind is asked.
    here: Any = replace(choose_device("cpu", "float32"), torch_device=torch.device(device))
    setup = StageSetup(
        name="dpo", device=here, processes=3, engine="ddp", config=config, seed=0, budget=60,
        settings=DpoSettings(data=(DataSource(path="x"),), lora=LoraSettings(rank=4, alpha=8)),
        padded=False, quantized=False, baseline=50,
    )  # fmt: skip
    return setup.estimate(shape, _WORK, 0, recorded_rate(setup.rate_key(shape)))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_repeat_of_a_run_is_expected_to_take_its_own_seconds(device: str) -> None:
    """Though its processes' shares were unequal: the rate has that in it already."""
    made = _forecast(device)
    assert (made.seconds, made.reference_seconds) == (None, None)
    summary = {
        "tokens": 400, "steps": 5, "peak_memory_bytes": 77, "train_seconds": 12.5,
        "reference_computed": 10, "reference_seconds": 3.5,
    }  # fmt: skip
    remember_run(made, compare(made, summary), summary)
    again = _forecast(device)
    assert again.seconds == pytest.approx(12.5)
    assert again.reference_seconds == pytest.approx(3.5)


def test_a_run_without_a_record_has_no_estimate_of_its_time() -> None:
    made = _forecast("cpu")
    summary = {
        "tokens": 400, "steps": 5, "peak_memory_bytes": 77, "train_seconds": 12.5,
        "reference_computed": 0, "reference_seconds": 0.0,
    }  # fmt: skip
    found = compare(made, summary)
    assert found["rate_from"] is None
    assert found["seconds"] == {"estimated": None, "actual": 12.5}
    remember_run(made, found, summary)
    known = recorded_rate(made.setting)
    assert known is not None
    assert known.last_run is not None
    assert "seconds" not in known.last_run.ratios
    assert known.last_run.ratios["tokens"] == 1.0


def _run(folder: Path, **runtime: Any) -> dict[str, Any]:
    model = make_model_folder(folder / "model")
    settings = SftSettings(
        data=(DataSource(path=str(make_conversations(folder / "c.jsonl"))),),
        batch_size=8, max_steps=2, max_length=128, lora=LoraSettings(rank=2, alpha=4),
    )  # fmt: skip
    job = training_job(settings, model, folder / "out", **runtime)
    made = run_sft(job, QUIET, default_callbacks(job.run))
    summary: dict[str, Any] = read_json(made / "summary.json")
    return summary


def test_what_cannot_be_estimated_does_not_end_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def strange(*_: Any, **__: Any) -> Any:
        raise AttributeError("'StrangeConfig' object has no attribute 'hidden_size'")

    monkeypatch.setattr("tandem.pipeline.default_callbacks.estimate_run", strange)
    monkeypatch.setattr(context, "log", lambda _, text, **__: told.append(text))
    summary = _run(tmp_path)
    assert "estimate" not in summary
    assert summary["steps"] == 2
    assert [text for text in told if "no attribute 'hidden_size'" in text] == [
        "sft: this run is not estimated (AttributeError: 'StrangeConfig' object has no "
        "attribute 'hidden_size')"
    ]


def test_a_run_times_no_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.plan import rate

    def timed(*_: Any) -> float:
        raise AssertionError("other processes would wait for it")

    monkeypatch.setattr(rate, "timed_product", timed)
    assert _run(tmp_path)["estimate"]["seconds"]["estimated"] is None


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**_SMALL, tie_word_embeddings=True),
        LlamaConfig(**_SMALL),
        GPT2Config(vocab_size=90, n_embd=64, n_layer=2, n_head=4),
    ],
    ids=["tied", "untied", "gpt2"],
)
def test_copies_in_a_faster_order_are_those_that_a_run_makes(
    config: Any, quantization: str | None, tmp_path: Path
) -> None:
    if quantization is not None:
        pytest.importorskip("bitsandbytes")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", dtype=torch.float32, quantization=quantization)
    to_come = bytes_to_order(model)
    adapted = LoraWeights(LoraSettings(rank=4, alpha=8)).attach(model)
    assert ordered_bytes(adapted) == 0
    order_weights(adapted)
    order_head(adapted.get_base_model())
    if to_come == 0:
        pytest.skip("no oneDNN here")
    assert ordered_bytes(adapted) == to_come
    shape = described(config, LoraSettings(rank=4, alpha=8), attention="auto").shape
    assert copied_bytes(shape, quantized=quantization is not None) == to_come
