"""Which models and forms of attention a device of static shapes takes, and why not others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tandem.errors import UserError
from tandem.integrations.gaudi.gaudi_device import GaudiDevice, _waits
from tandem.recipe.run_settings import HpuSettings

from ..invariants.families import PADDED, TREES

EXPERTS = {"deepseek-v3", "phimoe", "mixtral", "qwen3-moe"}


DEVICE = GaudiDevice(torch.device("hpu"), torch.float32, HpuSettings(), lazy=False)


def _model(name: str) -> Any:
    family = TREES[name] if name in TREES else PADDED[name][0]
    return family.make(torch.float32)


@pytest.mark.parametrize("name", sorted(TREES.keys() - EXPERTS))
def test_families_whose_forward_never_waits_are_dense(name: str) -> None:
    model = _model(name)
    before = model.config._attn_implementation
    backend, why = DEVICE.attention("auto", model)
    assert (backend, why) == ("dense", "this device compiles a graph for every shape")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_mixtures_of_experts_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"decide by their values what to compute \(.*nonzero"):
        DEVICE.attention("auto", _model(name))
    assert _waits(_model("llama")) == []


def test_models_that_cannot_read_trees_are_refused() -> None:
    with pytest.raises(UserError, match="padded rows have no declared shapes"):
        DEVICE.attention("auto", _model("mamba"))


def test_other_forms_are_refused() -> None:
    model = _model("llama")
    for requested in ("segments", "varlen", "padded"):
        with pytest.raises(UserError, match=f"attention: {requested} cannot be used here"):
            DEVICE.attention(requested, model)
    assert DEVICE.attention("dense", model)[0] == "dense"


def test_the_fused_kernel_is_taken_where_it_can_compute_the_model() -> None:
    fused = replace(DEVICE, settings=HpuSettings(fused_attention=True))
    assert fused.attention("auto", _model("llama")) == ("fused", "asked for")
    with pytest.raises(UserError, match=r"Use hpu\.fused_attention: false"):
        fused.attention("dense", _model("llama"))
    with pytest.raises(UserError, match="soft-caps attention scores, which FusedSDPA cannot"):
        fused.attention("auto", _model("gemma2"))
