"""Models that cannot read packed trees through SFT, merge, DPO and merge, as any other."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, Lfm2Config, MambaConfig, StableLmConfig

from tandem.errors import UserError
from tandem.evaluate.evaluate_models import evaluate_models
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.training_settings import LoraSettings, SftSettings
from tandem.stages.dpo import run_dpo
from tandem.stages.merge import run_merge
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json, read_jsonl
from tests.jobs import evaluation_job, merge_job, training_job

from .made_inputs import QUIET, make_conversations, make_model_folder, make_pairs
from .test_pairs_and_evaluation import make_questions
from .test_training_stages import distance

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 1,
}  # fmt: skip
GATED: dict[str, Any] = {
    **SIZES, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
MODELS: dict[str, tuple[Any, str]] = {
    "mamba": (MambaConfig(**SIZES, state_size=8), "it keeps state across tokens"),
    "stablelm": (StableLmConfig(**GATED), "it does not use transformers' attention interface"),
    "lfm2": (
        Lfm2Config(**GATED, layer_types=["conv", "full_attention"]),
        "it carries tokens along outside of its attention layers",
    ),
}


def train(
    kind: str,
    model: Path,
    folder: Path,
    *,
    budget: int = 400,
    attention: str = "auto",
    console: Console = QUIET,
    **changes: Any,
) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    data = folder.parent / f"{kind}.jsonl"
    if not data.exists():
        (make_conversations if kind == "sft" else make_pairs)(data)
    values: dict[str, Any] = {
        "data": (DataSource(path=str(data)),), "batch_size": 6, "max_steps": 3,
        "learning_rate": 1e-2, "max_length": 128, "logging_steps": 1,
        "lora": LoraSettings(rank=4, alpha=8, dropout=0.1 if kind == "sft" else 0.0),
    }  # fmt: skip
    stage: Any = run_sft if kind == "sft" else run_dpo
    stage(
        training_job(
            (SftSettings if kind == "sft" else DpoSettings)(**values | changes),
            model,
            folder,
            attention=attention,
            tokens_per_microbatch=budget,
        ),
        console,
    )
    return load_file(folder / "adapter_model.safetensors")


def merge(base: Path, adapter: Path, output: Path) -> None:
    run_merge(merge_job(base, adapter, output), QUIET)


@pytest.mark.parametrize("name", MODELS)
def test_sft_merge_and_dpo(name: str, tmp_path: Path) -> None:
    config, reason = MODELS[name]
    model = make_model_folder(tmp_path / "model", config=config)
    said = io.StringIO()
    console = Console(file=said, width=400)
    train("sft", model, tmp_path / "sft", console=console)
    assert f"attention padded ({reason}), 400 tokens a micro-batch" in said.getvalue()
    summary = read_json(tmp_path / "sft" / "summary.json")
    assert summary["attention"] == "padded"
    # Nothing was saved by packing or sharing, so nothing is claimed.
    assert summary["padded_tokens"] == summary["shared_tokens"] == 0
    assert summary["tokens"] > 0
    losses = [line["loss"] for line in read_jsonl(tmp_path / "sft" / "metrics.jsonl")]
    assert losses[-1] < losses[0]

    # A merge compares the merged model's log-probs with base + adapter's.
    merge(model, tmp_path / "sft", tmp_path / "merged")
    train("dpo", tmp_path / "merged", tmp_path / "dpo", console=console, max_steps=2)
    first, *_, last = read_jsonl(tmp_path / "dpo" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert last["rewards/margins"] > 0
    merge(tmp_path / "merged", tmp_path / "dpo", tmp_path / "final")
    AutoModelForCausalLM.from_pretrained(tmp_path / "final")


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_schedule_does_not_change_the_parameters(kind: str, tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", config=MODELS["stablelm"][0])
    whole = train(kind, model, tmp_path / "whole", budget=4096)
    # Every record alone, each computed once more in the backward.
    single = train(kind, model, tmp_path / "single", budget=1, gradient_checkpointing=True)
    assert distance(single, whole) < 5e-5


def test_padded_and_packed_train_the_same_parameters(tiny_model: Path, tmp_path: Path) -> None:
    """On a model that has the choice, dropout included."""
    for kind in ("sft", "dpo"):
        packed = train(kind, tiny_model, tmp_path / f"{kind}-packed")
        padded = train(kind, tiny_model, tmp_path / f"{kind}-padded", attention="padded")
        assert distance(padded, packed) < 5e-5


def test_evaluation_pads_what_it_cannot_pack(tiny_model: Path, tmp_path: Path) -> None:
    mamba = make_model_folder(tmp_path / "mamba", config=MODELS["mamba"][0])
    pairs = make_pairs(tmp_path / "pairs.jsonl", 10)
    questions = make_questions(tmp_path / "questions.jsonl")
    said = io.StringIO()

    def evaluate(folder: str, attention: str) -> dict[str, Any]:
        found = evaluate_models(
            evaluation_job(
                EvaluationSettings(
                    questions=(DataSource(path=str(questions)),),
                    pairs=(DataSource(path=str(pairs)),),
                    max_new_tokens=4,
                ),
                {"mamba": str(mamba), "llama": str(tiny_model)},
                tmp_path / folder,
                attention=attention,
                tokens_per_microbatch=300,
            ),
            Console(file=said, width=400),
        )
        models: dict[str, Any] = found["models"]
        return models

    auto = evaluate("auto", "auto")
    assert "mamba: attention padded (it keeps state across tokens)" in said.getvalue()
    assert "llama: attention padded" not in said.getvalue()
    padded = evaluate("padded", "padded")
    for name in ("mamba", "llama"):
        for key in ("loss", "preference_margin"):
            assert padded[name][key] == pytest.approx(auto[name][key], rel=1e-5, abs=1e-6)


def test_what_a_mamba_adapter_leaves_out_is_said(tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model", config=MODELS["mamba"][0])
    said = io.StringIO()
    console = Console(file=said, width=400)
    trained = train("sft", model, tmp_path / "all", console=console, max_steps=1)
    assert "all-linear leaves out dt_proj, out_proj" in said.getvalue()
    assert {name.split(".")[-3] for name in trained} == {"in_proj", "x_proj"}
    lora = LoraSettings(rank=4, alpha=8, target_modules=("in_proj", "dt_proj"))
    with pytest.raises(UserError, match="dt_proj"):
        train("sft", model, tmp_path / "named", lora=lora)
    with pytest.raises(UserError, match=r"attention: segments.*padded"):
        train("sft", model, tmp_path / "trees", attention="segments")
