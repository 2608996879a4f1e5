"""Which norms and gates are compiled: those that behave like the function, in any family."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tandem.data.batching.collate import collate
from tandem.errors import UserError
from tandem.model import elementwise
from tandem.model.attention.select import choose_backend
from tandem.model.logprobs.sequence_logps import sequence_logps
from tandem.model.lora.forward import switch_dropout_off

from ..invariants.families import TREES
from ..invariants.made import attend, make_trees


@pytest.mark.parametrize("name", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_a_compilers_cache_that_cannot_be_written_is_put_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setenv(name, str(tmp_path / "new"))
    elementwise.settle_compile_caches(said.append)
    assert os.environ[name] == str(tmp_path / "new")
    assert said == []
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(name, str(tmp_path / "file" / "deeper"))
    elementwise.settle_compile_caches(said.append)
    assert Path(os.environ[name]).is_dir()
    assert name in said[0]
    assert "not kept" in said[0]


# What is compiled of a family's two layers: functions, and how many modules.
TAKEN: dict[str, tuple[set[str], int]] = {
    "llama": ({"_rms", "_silu_gate"}, 7),
    "mistral": ({"_rms", "_silu_gate"}, 7),
    "qwen3": ({"_rms", "_silu_gate"}, 11),
    "gemma2": ({"_rms_from_one", "_gelu_gate"}, 11),
    "gemma3": ({"_rms_from_one", "_gelu_gate"}, 15),
    "olmo2": ({"_rms", "_silu_gate"}, 11),
    "cohere": ({"_silu_gate"}, 2),
    "phi3": ({"_rms"}, 5),
}


@pytest.fixture(autouse=True)
def _as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)


def functions(model: nn.Module) -> list[str]:
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    taken = [
        f
        for f in forwards
        if getattr(f, "func", None) in (elementwise._compiled_norm, elementwise._compiled_mlp)
    ]
    return [f.args[2].__name__ for f in taken]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TAKEN)
def test_what_is_taken_computes_the_same(family: str, dtype: torch.dtype) -> None:
    trees = make_trees()
    found = []
    for take in (False, True):
        model = TREES[family].make(dtype)
        switch_dropout_off(model)
        if take:
            count = elementwise.compile_elementwise(model)
            kinds, wanted = TAKEN[family]
            names = functions(model)
            assert (len(names), count) == (wanted, wanted)
            if dtype == torch.float32:
                assert set(names) == kinds
        attend(model, choose_backend("auto", model)[0])
        with torch.no_grad():
            found.append(sequence_logps(model, collate(trees)))
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found[1], found[0], rtol=rounding, atol=rounding)


def test_a_model_without_any_is_refused() -> None:
    with pytest.raises(UserError, match="GPT2LMHeadModel has no norms or gated MLPs"):
        elementwise.compile_elementwise(TREES["gpt2"].make(torch.float32))


def test_a_module_that_does_more_is_left_alone() -> None:
    model = TREES["llama"].make(torch.float32)
    norm: Any = model.model.norm
    plain = norm.forward
    norm.forward = lambda hidden: plain(hidden) * 1.01
    assert elementwise.compile_elementwise(model) == 6
