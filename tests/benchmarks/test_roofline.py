"""The operations that the roofline counts, by hand and by torch's own counter."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MistralConfig

from benchmarks import plain, roofline, work
from tandem.data.encoded.example import Branch, Example
from tandem.data.records import Origin


def _config(**other: Any) -> MistralConfig:
    return MistralConfig(
        vocab_size=100, hidden_size=8, intermediate_size=16, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=None, **other,
    )  # fmt: skip


def test_needed_operations_by_hand() -> None:
    branch = [
        Branch(np.arange(length, dtype=np.int32), np.ones(length, dtype=bool)) for length in (2, 3)
    ]
    prefix = Branch(np.arange(4, dtype=np.int32), np.zeros(4, dtype=bool))
    tree = Example(prefix, tuple(branch), Origin("x", 1))
    # Fed: 4 prompt tokens, 1 and 2 answer tokens. The first branch's row runs on from the prompt.
    tokens = 4 + 1 + 2
    visible = (1 + 2 + 3 + 4 + 5) + (4 + 1) + (4 + 2)
    linear = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16
    adapter = 16 * ((8 + 8) + (8 + 4) + (8 + 4))
    loop = (4 * linear + 6 * adapter) * tokens + 3 * 4 * visible * 8 + 2 * 2 * 5 * 100 * 8
    reference = 2 * linear * tokens + 4 * visible * 8 + 2 * 5 * 100 * 8
    # Three prompt rows predict nothing; nothing learns from the embeddings' gradient.
    idle = 3 * 6 * 3 * 8 * 16 + 2 * tokens * (8 * (8 + 4 + 4) + 3 * 16 * 8)
    config = _config(num_hidden_layers=1)
    assert roofline.needed_operations([tree], config, "dpo") == roofline.Needed(
        loop, reference, idle
    )
    # SFT's adapter is on the output projection, too.
    loop += 6 * 16 * (8 + 8) * tokens
    idle -= 3 * 2 * 3 * 8 * 16
    assert roofline.needed_operations([tree], config, "sft") == roofline.Needed(loop, 0.0, idle)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_needed_operations_are_those_that_torch_counts(stage: Literal["sft", "dpo"]) -> None:
    """One sequence through transformers, every token but the first trained, nothing shared.

    What differs is known: torch counts the causal half of attention whole, and leaves out
    gradients of the embeddings' outputs, which the formula does not.
    """
    length, config = 65, _config(num_hidden_layers=3, attn_implementation="eager")
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), plain.lora_config(stage))
    trained = np.arange(length) > 0
    whole = Branch(np.arange(length, dtype=np.int32), trained)
    tree = Example(Branch(whole.input_ids[:0], trained[:0]), (whole,), Origin("x", 1))
    task = work.Work("plain", stage, "", "", "", 1, 1, size=1)

    with FlopCounterMode(display=False) as counter:
        logps = plain._logps(model, [tree], task)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        logps.sum().backward()
    counted = forward + counter.get_total_flops()

    needed = roofline.needed_operations([tree], config, stage)
    rows = length - 1
    hidden_half = 3 * 4 * (rows * rows - rows * (rows + 1) // 2) * 8 * 3
    # All rows are read, so `avoidable` is the first layer's gradient alone.
    assert counted == pytest.approx(needed.loop + hidden_half - needed.avoidable, rel=1e-9)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), model.disable_adapter():
        plain._logps(model, [tree], task)
    if stage == "dpo":
        once = counter.get_total_flops() - hidden_half // 3
        assert once == pytest.approx(needed.reference, rel=1e-9)


def test_rates_are_of_both_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline._SIZES, "cpu", (64, 128))
    rates = roofline.gemm_rates(repeats=1)
    assert set(rates) == {"torch.mm", "oneDNN"}
    assert all(1e8 < rate < 1e14 for rate in rates.values())
