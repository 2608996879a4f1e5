"""Adapted layers compute what peft's do, in whatever way they do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tandem.model import load_model as loading
from tandem.model.lora.adapted import LowRank, RowNorms, adapted_layers, fuse_low_rank
from tandem.model.lora.adapter import LoraWeights
from tandem.model.lora.forward import DropoutKeys, KeyedDropout
from tandem.recipe.lora_settings import LoraSettings

from ..stages.made_inputs import make_model_folder


class Layers(nn.Module):
    """A layer with a large bias, one without, and one that is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.biased, self.plain, self.turned = (
            nn.Linear(12, 8),
            nn.Linear(8, 8, False),
            Conv1D(6, 8),
        )
        nn.init.normal_(self.biased.bias, std=10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.turned(torch.tanh(self.plain(torch.tanh(self.biased(x)))))
        return found


def wrapped(dtype: torch.dtype, dropout: bool, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = Layers().to(dtype)
    targets = changes.pop("target_modules", ["biased", "plain"])
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=True, **changes)
    adapted = get_peft_model(model, config)
    shared = DropoutKeys(torch.arange(7))
    for number, layer in enumerate(adapted_layers(adapted)):
        if dropout:
            layer.lora_dropout["default"] = KeyedDropout(0.3, number, shared)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return adapted.train()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("targets", [["biased", "plain"], ["turned"]])
def test_dora_is_pefts(dtype: torch.dtype, dropout: bool, targets: list[str]) -> None:
    """Outputs and gradients, also where the products are fused (float32), and the input's."""
    found = []
    for ours in (True, False):
        turned = targets == ["turned"]
        model = wrapped(dtype, dropout, target_modules=targets, fan_in_fan_out=turned)
        if ours:
            fuse_low_rank(model)
        x = torch.randn(7, 12, dtype=dtype, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        out = model(x)
        (out * torch.arange(6)).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        found.append({"out": out.detach(), "x": x.grad, **gradients})
    close = 1e-12 if dtype == torch.float64 else 2e-5
    assert any("magnitude" in name for name in found[0])
    for name, wanted in found[1].items():
        assert (found[0][name] - wanted).norm() <= close * wanted.norm(), name


def test_the_norms_are_those_of_the_sum() -> None:
    for layer in adapted_layers(wrapped(torch.float64, False)):
        low = LowRank(layer.lora_A["default"].weight, layer.lora_B["default"].weight, 5 / 3)
        whole = layer.base_layer.weight + low.scale * low.up @ low.down
        torch.testing.assert_close(RowNorms(layer.base_layer).of(low), whole.norm(dim=1))


def test_lengths_that_have_not_moved_change_no_bit() -> None:
    model, x = wrapped(torch.float32, False), torch.randn(7, 12)
    for layer in adapted_layers(model):
        low = LowRank(layer.lora_A["default"].weight, layer.lora_B["default"].weight, 5 / 3)
        layer.lora_magnitude_vector["default"].weight.data = RowNorms(layer.base_layer).of(low)
    fuse_low_rank(model)
    found = model(x)
    for layer in adapted_layers(model):
        del layer.lora_magnitude_vector["default"]
    fuse_low_rank(model)
    assert torch.equal(found, model(x))


@pytest.fixture
def _stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_COMFORTABLE", 0.0)


@pytest.mark.usefixtures("_stored")
def test_lengths_begin_as_those_of_rows_that_are_stored_narrow(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", dtype=torch.bfloat16)
    model = loading.load_model(folder, dtype=torch.float32)
    adapted = LoraWeights(LoraSettings(dora=True)).attach(model)
    layers = list(adapted_layers(adapted))
    assert layers
    for layer in layers:
        assert layer.base_layer.weight.dtype == torch.bfloat16
        length = layer.lora_magnitude_vector["default"].weight
        torch.testing.assert_close(length.data, layer.base_layer.weight.float().norm(dim=1))
