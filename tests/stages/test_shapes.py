"""What a stage declares where shapes are static, and what it says about the cost."""

from __future__ import annotations

import pytest
import torch

from tandem.errors import UserError
from tandem.integrations.gaudi.static_shapes import Buckets, declared_shapes
from tandem.recipe.run_settings import HpuSettings, Runtime
from tandem.recipe.training_settings import DpoSettings
from tandem.runtime.device import Device

from ..data.test_buckets import as_trees, make_pair

# Each feeds 10 + 5 + 5 rows.
TREES = as_trees([make_pair(row, 10, 6, 6) for row in range(12)])
SETTINGS = DpoSettings(data=(), batch_size=4, max_length=64, max_prompt_length=32)


def declare(
    hpu: HpuSettings, kind: str = "hpu", tokens: int | None = None
) -> tuple[Buckets | None, int, list[str]]:
    """The shapes, the budget, and what was told."""
    told: list[str] = []
    buckets, budget = declared_shapes(
        TREES,
        SETTINGS,
        device=Device(torch.device(kind), torch.float32),
        runtime=Runtime(hpu=hpu, tokens_per_microbatch=tokens or "auto"),
        budget=tokens or 50,
        seed=1,
        log=told.append,
    )
    return buckets, budget, told


def test_declared_lengths_are_the_budget() -> None:
    buckets, budget, told = declare(HpuSettings(buckets=(30, 60)))
    assert buckets is not None
    assert ([shape.rows for shape in buckets.shapes], budget) == ([30, 60], 60)
    # Steps of four pairs: three fill 60 rows, the fourth is 20 rows in 30.
    assert told == ["buckets: 11% of the tokens fed are padding (micro-batches of 30, 60 tokens)"]


def test_a_smaller_budget_of_ones_own_stays() -> None:
    buckets, budget, told = declare(HpuSettings(buckets=(30, 60)), tokens=40)
    assert buckets is not None
    assert budget == 40
    assert told[0].startswith("buckets: 33%"), "40 rows in 60"


def test_a_budget_beyond_the_lengths_is_refused() -> None:
    with pytest.raises(UserError, match=r"tokens_per_microbatch 70 exceeds .* hpu\.buckets, 60"):
        declare(HpuSettings(buckets=(30, 60)), tokens=70)


def test_pad_max_says_what_it_costs() -> None:
    buckets, budget, told = declare(HpuSettings(buckets="max"))
    assert buckets is not None
    assert (buckets.longest, budget) == (128, 128)
    assert told == ["pad_max: 38% of the tokens fed are padding (micro-batches of 128 tokens)"]


def test_auto_keeps_the_budget() -> None:
    buckets, budget, told = declare(HpuSettings())
    assert buckets is not None
    assert (buckets.longest, budget) == (128, 50)
    assert told[0].startswith("buckets: ")


def test_elsewhere_the_section_does_nothing_and_one_line_says_so() -> None:
    assert declare(HpuSettings(lazy_mode=True), "cpu") == (
        None,
        50,
        ["the recipe's hpu section does nothing on cpu"],
    )
    assert declare(HpuSettings(), "cpu") == (None, 50, [])
