"""A model that does not fit into memory is refused before it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tandem.errors import UserError
from tandem.model.load_model import load_model
from tandem.runtime.device import Device

from ..stages.made_inputs import make_model_folder


def test_both_numbers_and_the_ways_out_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model_folder(tmp_path / "model")
    numbers = sum(weight.numel() for weight in load_model(folder, dtype=torch.float32).parameters())
    monkeypatch.setattr(Device, "free_memory", lambda _: numbers * 3)
    monkeypatch.setattr(
        "tandem.model.load_model.AutoModelForCausalLM.from_pretrained",
        lambda *_, **__: pytest.fail("it was loaded"),
    )
    with pytest.raises(
        UserError, match=r"takes 0\.0 GB in float32, and 0\.0 GB of memory are free"
    ):
        load_model(folder, dtype=torch.float32)
    with pytest.raises(pytest.fail.Exception):
        load_model(folder, dtype=torch.bfloat16)


def test_a_card_and_the_host_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model_folder(tmp_path / "model")
    free = {"cpu": 10**12, "cuda": 100}
    monkeypatch.setattr(Device, "free_memory", lambda self: free[self.kind])
    for quantization in (None, "nf4"):
        with pytest.raises(UserError, match=r"0\.0 GB on cuda are free.*`quantization: nf4`"):
            load_model(folder, dtype=torch.bfloat16, device="cuda", quantization=quantization)
    free |= {"cpu": 100, "cuda": 10**12}
    with pytest.raises(UserError, match=r"0\.0 GB of memory are free"):
        load_model(folder, dtype=torch.bfloat16, device="cuda")
