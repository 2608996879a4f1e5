"""Steps depend on seed and batch size alone; packing never cuts and never reorders the step."""

from __future__ import annotations

import random

import pytest

from tandem.data.order import steps, total_steps
from tandem.data.packing import pack


def test_an_epoch_shows_every_example_once_in_a_new_order() -> None:
    taken = list(steps(10, 4, seed=3, count=6))
    assert [len(step.examples) for step in taken] == [4, 4, 2, 4, 4, 2]
    first = [i for step in taken[:3] for i in step.examples]
    second = [i for step in taken[3:] for i in step.examples]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [step.epoch for step in taken] == [0, 0, 0, 1, 1, 1]


def test_starting_late_gives_the_same_steps() -> None:
    whole = list(steps(10, 3, seed=1, count=9))
    assert list(steps(10, 3, seed=1, count=9, start=5)) == whole[5:]
    assert list(steps(10, 3, seed=2, count=9)) != whole


def test_total_steps() -> None:
    assert total_steps(10, 4) == 3
    assert total_steps(10, 4, epochs=2.5) == 8
    assert total_steps(10, 4, max_steps=7) == 7
    with pytest.raises(ValueError, match="positive"):
        total_steps(0, 4)


def test_packing_keeps_every_tree_once_and_within_the_budget() -> None:
    rng = random.Random(0)
    for _ in range(50):
        tokens = [rng.randint(1, 120) for _ in range(rng.randint(1, 40))]
        batches = pack(tokens, 100)
        assert sorted(i for batch in batches for i in batch) == list(range(len(tokens)))
        for batch in batches:
            assert len(batch) == 1 or sum(tokens[i] for i in batch) <= 100


def test_packing_fills_close_to_the_bound() -> None:
    rng = random.Random(1)
    tokens = [rng.randint(20, 400) for _ in range(200)]
    assert sum(tokens) / (len(pack(tokens, 2048)) * 2048) > 0.95


def test_packing_of_a_known_step() -> None:
    assert pack([60, 50, 40, 150, 50], 100) == [(0, 2), (1, 4), (3,)]
