"""A model that does not fit into memory is refused before it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tandem.errors import UserError
from tandem.model.load_model import check_fits, load_model
from tandem.model.model_folder import load_config, model_without_weights
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


def test_the_place_where_weights_stay_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go to a card one after the other, so that the host need not have room for them."""
    folder = make_model_folder(tmp_path / "model")
    free = {"cpu": 10**12, "cuda": 100}
    monkeypatch.setattr(Device, "free_memory", lambda self: free[self.kind])
    for quantization in (None, "nf4"):
        with pytest.raises(UserError, match=r"0\.0 GB on cuda are free.*`quantization: nf4`"):
            load_model(folder, dtype=torch.bfloat16, device="cuda", quantization=quantization)
    free |= {"cpu": 100, "cuda": 10**12}
    check_fits(
        folder,
        model_without_weights(load_config(folder)),
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
    )


def test_what_is_shared_and_what_is_quantised_takes_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model_folder(tmp_path / "model")
    described, host = model_without_weights(load_config(folder)), torch.device("cpu")
    model = load_model(folder, dtype=torch.float32)
    numbers = sum(weight.numel() for weight in model.parameters())
    monkeypatch.setattr(Device, "free_memory", lambda _: numbers * 2)
    check_fits(folder, described, dtype=torch.float32, device=host, processes=2)
    with pytest.raises(UserError, match="shared by 2 processes"):
        check_fits(folder, described, dtype=torch.float64, device=host, processes=2)
    monkeypatch.setattr(Device, "free_memory", lambda _: numbers * 3)
    check_fits(folder, described, dtype=torch.float32, device=host, quantization="nf4")
    with pytest.raises(UserError, match=r"GB in float32, and"):
        check_fits(folder, described, dtype=torch.float32, device=host)
