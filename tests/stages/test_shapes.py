"""What a stage declares where shapes are static, and what it says about the cost."""

from __future__ import annotations

import pytest
import torch

from tandem.data.batching.sampler import StepSampler
from tandem.errors import UserError
from tandem.integrations.choose import DeviceNames, idle_settings
from tandem.integrations.gaudi.gaudi_device import GaudiDevice
from tandem.integrations.gaudi.static_shapes import Buckets
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.run_settings import HpuSettings, RunSettings
from tandem.runtime.device import BatchRequest, Device

from ..data.test_buckets import as_trees, make_pair

# Each feeds 10 + 5 + 5 rows.
TREES = as_trees([make_pair(row, 10, 6, 6) for row in range(12)])
SETTINGS = DpoSettings(data=(), batch_size=4, max_length=64, max_prompt_length=32)


def declare(hpu: HpuSettings, tokens: int | None = None) -> tuple[Buckets, int, list[str]]:
    """The shapes, the budget, and what was told."""
    told: list[str] = []
    request = BatchRequest(
        TREES, None, StepSampler(12, SETTINGS.batch_size, seed=1),
        SETTINGS.max_length, tokens or 50, tokens or "auto", told.append,
    )  # fmt: skip
    shapes, budget = GaudiDevice(torch.device("hpu"), torch.float32, hpu, lazy=False).batch_shapes(
        request
    )
    assert isinstance(shapes, Buckets)
    return shapes, budget, told


def test_declared_lengths_are_the_budget() -> None:
    buckets, budget, told = declare(HpuSettings(buckets=(30, 60)))
    assert ([shape.rows for shape in buckets.shapes], budget) == ([30, 60], 60)
    # Steps of four pairs: three fill 60 rows, the fourth is 20 rows in 30.
    assert told == ["buckets: 11% of the tokens fed are padding (micro-batches of 30, 60 tokens)"]


def test_a_smaller_budget_of_ones_own_stays() -> None:
    _, budget, told = declare(HpuSettings(buckets=(30, 60)), tokens=40)
    assert budget == 40
    assert told[0].startswith("buckets: 33%"), "40 rows in 60"


def test_a_budget_beyond_the_lengths_is_refused() -> None:
    with pytest.raises(UserError, match=r"tokens_per_microbatch 70 exceeds .* hpu\.buckets, 60"):
        declare(HpuSettings(buckets=(30, 60)), tokens=70)


def test_pad_max_says_what_it_costs() -> None:
    buckets, budget, told = declare(HpuSettings(buckets="max"))
    assert (buckets.longest, budget) == (128, 128)
    assert told == ["pad_max: 38% of the tokens fed are padding (micro-batches of 128 tokens)"]


def test_auto_keeps_the_budget() -> None:
    buckets, budget, told = declare(HpuSettings())
    assert (buckets.longest, budget) == (128, 50)
    assert told[0].startswith("buckets: ")


def test_elsewhere_the_section_does_nothing_and_one_line_says_so() -> None:
    cpu = Device(torch.device("cpu"), torch.float32)
    said = ["the recipe's hpu section does nothing on cpu"]
    assert (
        idle_settings(RunSettings(model="m", output_dir="o", hpu=HpuSettings(lazy_mode=True)), cpu)
        == said
    )
    assert idle_settings(RunSettings(model="m", output_dir="o"), cpu) == []
    fused = RunSettings(model="m", output_dir="o", hpu=HpuSettings(fused_optimizer=True))
    card = DeviceNames("hpu", "bfloat16")
    assert idle_settings(fused, card, "adamw") == []
    assert idle_settings(fused, card, "lion") == [
        "hpu.fused_optimizer does nothing for optimizer: lion"
    ]
    request = BatchRequest(TREES, None, None, 64, 50, "auto", said.append)
    assert cpu.batch_shapes(request) == (None, 50)
