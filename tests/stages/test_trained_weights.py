"""A kind of training that tandem does not know is one class, and the stages train it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.errors import UserError
from tandem.model.lora.adapter import LoraWeights
from tandem.model.lora.adapter_config import read_config
from tandem.model.model_folder import model_folder
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.training_settings import LoraSettings, SftSettings
from tandem.stages.dpo import run_dpo
from tandem.stages.merge import run_merge
from tandem.stages.sft import run_sft
from tandem.stages.training.context import TrainingStage
from tests.jobs import merge_job, training_job

from .made_inputs import QUIET, make_conversations, make_pairs

_SMALL: dict[str, Any] = {
    "batch_size": 8, "max_steps": 3, "max_length": 128, "learning_rate": 0.05, "save_steps": 1,
    "warmup_steps": 0, "lora": LoraSettings(rank=4, alpha=8),
}  # fmt: skip


class OnlyNorms:
    """Trains the weights of norms, in the model itself."""

    leaves = "model"

    def attach(self, model: Any, **_: Any) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
        return model

    def save(self, model: Any, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "norms")

    def finish(self, folder: Path) -> str:
        return ""

    def late(self, folder: Path) -> dict[str, Tensor]:
        return {}

    def load(self, model: Any, folder: Path) -> None:
        model.load_state_dict(load_file(folder / "norms"), strict=False)

    def reference(self, model: Any) -> None:
        return None


class RankStabilised(LoraWeights):
    """LoRA whose update is scaled by alpha / sqrt(rank) (arXiv 2312.03732)."""

    def attach(self, model: Any, **given: Any) -> Any:
        wrapped = super().attach(model, **given)
        for layer in (m for m in wrapped.modules() if isinstance(m, LoraLayer)):
            layer.scaling["default"] *= self.settings.rank**0.5
        wrapped.peft_config["default"].use_rslora = True
        return wrapped


def _train(stage: str, weights: Any, base: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Train a stage of these weights in place of an adapter."""
    kind = partial(TrainingStage, weights=lambda _: weights)
    patch.setattr(f"tandem.stages.{stage}.TrainingStage", kind)
    settings: Any = SftSettings if stage == "sft" else DpoSettings
    write = make_conversations if stage == "sft" else make_pairs
    data = (DataSource(path=str(write(folder.parent / f"{stage}.jsonl"))),)
    train: Any = run_sft if stage == "sft" else run_dpo
    options = {"chat_template": "neural-chat", "dtype": "float32"}
    train(training_job(settings(data=data, **_SMALL), base, folder, **options), QUIET)


def _full(*_: Any) -> None:
    raise OSError("full")


def test_norms_alone_are_trained_saved_and_resumed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _train("sft", OnlyNorms(), tiny_model, tmp_path / "whole", monkeypatch)
    trained = load_file(tmp_path / "whole" / "norms")
    before = load_file(model_folder(str(tiny_model)) / "model.safetensors")
    assert trained.keys() == {name for name in before if "norm" in name}
    assert all(not torch.equal(trained[name], before[name]) for name in trained)

    with monkeypatch.context() as patch:
        patch.setattr("tandem.stages.training.outputs.find_ending", _full)
        with pytest.raises(OSError, match="full"):
            _train("sft", OnlyNorms(), tiny_model, tmp_path / "stopped", patch)
    assert list((tmp_path / "stopped" / "checkpoints").iterdir())
    _train("sft", OnlyNorms(), tiny_model, tmp_path / "stopped", monkeypatch)
    again = load_file(tmp_path / "stopped" / "norms")
    assert all(torch.equal(again[name], trained[name]) for name in trained)


def test_weights_without_a_reference_of_their_own_are_refused_by_dpo(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="cannot be its own reference"):
        _train("dpo", OnlyNorms(), tiny_model, tmp_path / "dpo", monkeypatch)


def test_another_scaling_of_lora_is_trained_by_dpo_and_merged(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge compares the merged model with base and adapter, loaded from its folder."""
    weights = RankStabilised(_SMALL["lora"], base=str(tiny_model))
    _train("dpo", weights, tiny_model, tmp_path / "dpo", monkeypatch)
    assert read_config(tmp_path / "dpo").use_rslora
    run_merge(merge_job(tiny_model, tmp_path / "dpo", tmp_path / "merged"), QUIET)
    assert (tmp_path / "merged" / "model.safetensors").exists()
