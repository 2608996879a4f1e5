"""Which models and forms of attention a device of static shapes takes, and why not others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tandem.errors import UserError
from tandem.integrations.gaudi.attention import _waits, choose_static

from ..invariants.families import PADDED, TREES

EXPERTS = {"deepseek-v3", "phimoe", "mixtral", "qwen3-moe"}


def _model(name: str) -> Any:
    family = TREES[name] if name in TREES else PADDED[name][0]
    return family.make(torch.float32)


@pytest.mark.parametrize("name", sorted(TREES.keys() - EXPERTS))
def test_families_whose_forward_never_waits_are_dense(name: str) -> None:
    model = _model(name)
    before = model.config._attn_implementation
    backend, why = choose_static("auto", model, fused=False)
    assert (backend, why) == ("dense", "this device compiles a graph for every shape")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_mixtures_of_experts_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"decide by their values what to compute \(.*nonzero"):
        choose_static("auto", _model(name), fused=False)
    assert _waits(_model("llama")) == []


def test_models_that_cannot_read_trees_are_refused() -> None:
    with pytest.raises(UserError, match="padded rows have no declared shapes"):
        choose_static("auto", _model("mamba"), fused=False)


def test_other_forms_are_refused() -> None:
    model = _model("llama")
    for requested in ("segments", "varlen", "padded"):
        with pytest.raises(UserError, match=f"attention: {requested} cannot be used here"):
            choose_static(requested, model, fused=False)
    assert choose_static("dense", model, fused=False)[0] == "dense"


def test_the_fused_kernel_is_taken_where_it_can_compute_the_model() -> None:
    assert choose_static("auto", _model("llama"), fused=True) == ("fused", "asked for")
    with pytest.raises(UserError, match=r"Use hpu\.fused_attention: false"):
        choose_static("dense", _model("llama"), fused=True)
    with pytest.raises(UserError, match="soft-caps attention scores, which FusedSDPA cannot"):
        choose_static("auto", _model("gemma2"), fused=True)
