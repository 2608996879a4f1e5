"""The merged folder against peft's merge_and_unload, and an adapter that TRL could have saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from rich.console import Console

from tandem.stages.merge import run_merge
from tests.jobs import merge_job

from . import plain

CONFIGS: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "attention only": {"target_modules": ["q_proj", "k_proj", "v_proj"]},
    "rank-stabilised": {"use_rslora": True},
    "ranks and scales by layer": {
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 64},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_model_equals_merge_and_unload(
    name: str, stories_path: Path, conversations: list[plain.Labelled], tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    wrapped = get_peft_model(plain.load(stories_path), plain.lora_config(**CONFIGS[name]))
    plain.move_adapter(wrapped)
    wrapped.save_pretrained(adapter)

    folder = run_merge(merge_job(stories_path, adapter, tmp_path / "merged"), Console(quiet=True))

    merged = plain.load(folder)
    peer = PeftModel.from_pretrained(plain.load(stories_path), adapter).merge_and_unload()
    expected = peer.state_dict()
    assert merged.state_dict().keys() == expected.keys()
    for key, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-7)
    ids = torch.tensor(conversations[0].ids)[None]
    with torch.no_grad():
        before = plain.load(stories_path)(ids).logits
        torch.testing.assert_close(merged(ids).logits, peer(ids).logits, rtol=1e-4, atol=1e-4)
        assert (merged(ids).logits - before).abs().max() > 0.1, "the adapter does nothing"
