"""Learning rates: derived by hand, and those of transformers where it has the same schedule."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import get_scheduler

from tandem.recipe.choices import Scheduler
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import SftSettings
from tandem.recipe.unmeant import unmeant
from tandem.train.schedules import make_schedule


def settings_of(name: str, **values: Any) -> SftSettings:
    return SftSettings(data=(DataSource(path="x"),), lr_scheduler=name, **values)


def theirs(name: str, peak: float, warmup: int, total: int, **more: Any) -> list[float]:
    """Their factors times the peak, as they multiply."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    made: Any = get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=more)
    (factor,) = made.lr_lambdas
    return [peak * factor(step) for step in range(total)]


def ours(settings: SftSettings, total: int) -> list[float]:
    rate = make_schedule(settings, total)
    return [rate(step) for step in range(total)]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_they_are_those_of_transformers_to_the_bit(name: Scheduler) -> None:
    for peak, total, warmup in itertools.product((1e-4, 7.3e-5), (1, 7, 100), (0, 1, 10)):
        if name == "constant" and warmup:
            continue
        settings = settings_of(name, learning_rate=peak, warmup_steps=warmup)
        assert ours(settings, total) == theirs(name, peak, warmup, total)


@pytest.mark.parametrize("floor", [0.0, 0.1])
@pytest.mark.parametrize(("total", "warmup"), [(7, 0), (100, 10), (33, 1)])
def test_those_with_a_floor_are_those_of_transformers(
    floor: float, total: int, warmup: int
) -> None:
    peak = 3e-4
    common = {"learning_rate": peak, "warmup_steps": warmup, "min_lr_ratio": floor}
    assert ours(settings_of("cosine", **common), total) == pytest.approx(
        theirs("cosine_with_min_lr", peak, warmup, total, min_lr_rate=floor), rel=1e-12
    )
    for power in (1.0, 2.5):
        assert ours(settings_of("polynomial", lr_power=power, **common), total) == pytest.approx(
            theirs("polynomial", peak, warmup, total, lr_end=peak * floor, power=power), rel=1e-12
        )
    falling = -(-total // 5)
    # Their warm-up begins at the floor, ours at 0 as everywhere.
    assert ours(settings_of("wsd", decay_ratio=0.2, **common), total)[warmup:] == pytest.approx(
        theirs(
            "warmup_stable_decay", peak, warmup, total,
            num_decay_steps=falling, decay_type="1-sqrt", min_lr_ratio=floor,
        )[warmup:],
        rel=1e-12,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values", "shares"),
    [
        ("linear", {"min_lr_ratio": 0.2}, [0, 0.5, 1, 0.8, 0.6, 0.4]),
        # 0.5 x (1 + cos(k pi / 4)), half of it above the floor of a half
        ("cosine", {"min_lr_ratio": 0.5}, [0, 0.5, 1, 0.926776695, 0.75, 0.573223305]),
        ("polynomial", {"lr_power": 2.0}, [0, 0.5, 1, 0.5625, 0.25, 0.0625]),
        # half of six steps fall: 1 - sqrt(0/3), 1 - sqrt(1/3), 1 - sqrt(2/3)
        ("wsd", {"decay_ratio": 0.5}, [0, 0.5, 1, 1, 0.422649731, 0.183503419]),
        # all six would, but the warm-up takes two
        ("wsd", {"decay_ratio": 1.0}, [0, 0.5, 1, 0.5, 0.292893219, 0.133974596]),
        ("constant_with_warmup", {}, [0, 0.5, 1, 1, 1, 1]),
    ],
)
def test_they_are_as_derived_by_hand(name: str, values: Any, shares: list[float]) -> None:
    settings = settings_of(name, learning_rate=2.0, warmup_steps=2, **values)
    assert ours(settings, 6) == pytest.approx([2.0 * share for share in shares], abs=1e-8)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("constant", {"min_lr_ratio": 0.1}),
        ("constant_with_warmup", {"min_lr_ratio": 0.0}),
        ("cosine", {"decay_ratio": 0.1}),
        ("wsd", {"lr_power": 2.0}),
        ("linear", {"lr_power": 1.0}),
    ],
)
def test_an_option_that_a_schedule_does_not_use_is_an_error(name: str, option: Any) -> None:
    """Even with its default value."""
    (key,) = option
    with pytest.raises(ValidationError, match=f"{key} has no effect with lr_scheduler: {name}"):
        settings_of(name, **option)


def test_settings_that_were_written_whole_can_be_read_again() -> None:
    for settings in (settings_of("wsd"), settings_of("constant"), settings_of("polynomial")):
        written = settings.model_dump(mode="json")
        read = SftSettings.model_validate(written)
        assert read == settings
        assert ("decay_ratio" in written) == (settings.lr_scheduler == "wsd")


def test_a_fall_that_does_not_fit_is_said() -> None:
    with pytest.raises(ValidationError, match=r"warmup_ratio 0.3 and decay_ratio 0.8 are more"):
        settings_of("wsd", warmup_ratio=0.3, decay_ratio=0.8)
    settings = settings_of("wsd", warmup_steps=6, decay_ratio=0.5, logging_steps=1)
    (said,) = unmeant(settings, steps=10, records=None)
    assert said == (
        "lr_scheduler: wsd: warm-up (6) and fall (5) are longer than the run's 10 steps together: "
        "the fall begins after the warm-up, in 4 steps"
    )
    assert unmeant(settings, steps=12, records=None) == []
