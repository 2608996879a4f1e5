"""Parameters with a learning rate of their own (LoRA+)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

from tandem.model.lora.adapter import LoraWeights
from tandem.model.trained_weights import rate_factor, set_rate_factor, trainable_parameters
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import LoraSettings, SftSettings
from tandem.recipe.unmeant import unmeant
from tandem.runtime.device import Device
from tandem.stages.sft import run_sft
from tandem.train.optimizers import load_state, make_optimizer, set_rate, state_of

from ..invariants.made import make_model
from ..jobs import training_job
from ..stages.made_inputs import QUIET, make_conversations, make_model_folder

CPU = Device(torch.device("cpu"), torch.float32)


def settings(**changes: Any) -> SftSettings:
    values: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, **changes}
    return SftSettings(data=(DataSource(path="x"),), **values)


def steps(optimizer: torch.optim.Optimizer, model: Any, count: int = 3) -> None:
    for step in range(count):
        for name, parameter in trainable_parameters(model).items():
            generator = torch.Generator().manual_seed(100 * step + len(name))
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_a_ratio_is_that_of_pefts_lora_plus() -> None:
    model = make_model(dtype=torch.float32)
    ours = LoraWeights(LoraSettings(rank=4, plus_ratio=8)).attach(model)
    theirs = copy.deepcopy(ours)
    factors = {name: rate_factor(p) for name, p in trainable_parameters(ours).items()}
    assert {("lora_B" in name, factor) for name, factor in factors.items()} == {
        (True, 8.0), (False, 1.0),
    }  # fmt: skip
    optimizer = make_optimizer(trainable_parameters(ours), settings(), CPU)
    set_rate(optimizer, 5e-3)
    steps(optimizer, ours)
    peer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=5e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.1
    )
    steps(peer, theirs)
    wanted = trainable_parameters(theirs)
    for name, parameter in trainable_parameters(ours).items():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-6, atol=1e-8)


def test_the_state_of_groups_is_saved_and_loaded_by_name() -> None:
    parameters = {name: torch.nn.Parameter(torch.ones(n)) for n, name in enumerate("abcd", 1)}
    for name in "ac":  # so that the order of groups is not that of the names
        set_rate_factor(parameters[name], 2.0)
    optimizer = make_optimizer(parameters, settings(), CPU)
    for number, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    saved = state_of(optimizer, parameters)
    fresh = make_optimizer(parameters, settings(), CPU)
    load_state(fresh, parameters, saved)
    again = state_of(fresh, parameters)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], saved[name]) for name in saved)


def test_a_step_moves_b_by_so_many_times_the_rate(tmp_path: Path) -> None:
    """AdamW's first step moves every weight by its rate."""
    model = make_model_folder(tmp_path / "model")
    talks = DataSource(path=str(make_conversations(tmp_path / "talks.jsonl")))
    job = training_job(
        SftSettings(
            data=(talks,), max_steps=1, max_length=128, learning_rate=1e-4,
            lora=LoraSettings(rank=2, plus_ratio=16),
        ),
        model,
        tmp_path / "sft",
    )  # fmt: skip
    folder = run_sft(job, QUIET)
    moved = load_file(folder / "adapter_model.safetensors")
    largest = [float(b.abs().max()) for name, b in moved.items() if "lora_B" in name]
    assert largest == pytest.approx([16e-4] * len(largest), rel=1e-2)


def test_a_rate_that_is_too_high_for_b_is_told() -> None:
    high = settings(lora=LoraSettings(plus_ratio=16))
    (said,) = unmeant(high, steps=None, records=None)
    assert said.startswith("learning_rate 0.01 times lora.plus_ratio 16 is larger than the weights")
    assert unmeant(settings(), steps=None, records=None) == []
