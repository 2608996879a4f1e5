"""The examination finds what no configuration says, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.model.attention.packing_probe import probe_packing
from tandem.model.attention.select import choose_backend

from ..invariants.families import PADDED, TREES, WINDOW
from ..invariants.made import make_model


def test_the_model_is_the_same_afterwards() -> None:
    for model in (make_model(window=8), PADDED["gpt-oss"][0].make(), PADDED["lfm2"][0].make()):
        before = model.config._attn_implementation
        ids = torch.arange(12)[None]
        with torch.no_grad():
            wanted = model(input_ids=ids, use_cache=False).logits
            probe_packing(model)
            found = model(input_ids=ids, use_cache=False).logits
        assert model.config._attn_implementation == before
        assert torch.equal(found, wanted)


def test_tokens_that_meet_outside_of_attention_are_noticed() -> None:
    model = make_model()
    assert probe_packing(model).obstacle is None
    mlp = model.model.layers[0].mlp
    whole = mlp.forward
    mlp.forward = lambda hidden: whole(hidden + 0.01 * hidden.roll(1, dims=1))
    assert "outside of its attention" in (probe_packing(model).obstacle or "")
    assert choose_backend("auto", model)[0] == "padded"


def test_a_window_that_only_the_mask_knows_is_noticed() -> None:
    model = TREES["gemma3"].make()
    assert probe_packing(model).obstacle is None
    layer = model.model.layers[0].self_attn
    for window in (None, WINDOW - 1, WINDOW + 1):
        layer.sliding_window = window
        assert "masked in a way" in (probe_packing(model).obstacle or "")


def test_what_layers_ask_of_attention_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mistral import modeling_mistral

    plain = modeling_mistral.ALL_ATTENTION_FUNCTIONS
    asked: dict[str, Any] = {}

    class Asking:
        """Attention functions that are handed something more."""

        def get_interface(self, *names: Any) -> Any:
            function = plain.get_interface(*names)

            def attend(*arguments: Any, **keywords: Any) -> tuple[Tensor, None]:
                result: tuple[Tensor, None] = function(*arguments, **keywords, **asked)
                return result

            return attend

    monkeypatch.setattr(modeling_mistral, "ALL_ATTENTION_FUNCTIONS", Asking())
    assert probe_packing(make_model()).obstacle is None
    asked["alibi"] = torch.ones(4)
    assert probe_packing(make_model()).obstacle == "its attention asks for alibi"
    asked.clear()
    asked["is_causal"] = False
    assert probe_packing(make_model()).obstacle == "its attention sees later tokens"


def test_soft_caps_and_head_sizes_are_seen() -> None:
    assert probe_packing(TREES["gemma2"].make()).softcap
    assert probe_packing(TREES["gemma3"].make()).head_sizes == {(8, 8)}
    assert not probe_packing(TREES["gemma3"].make()).softcap
