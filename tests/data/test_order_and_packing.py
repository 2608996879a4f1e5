"""Steps depend on seed and batch size alone; packing never cuts and never reorders the step."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.data.batching.collate import record_key
from tandem.data.batching.packing import assign_to_ranks, example_cost, pack, plan_step
from tandem.data.batching.sampler import StepSampler, WeightedSource
from tandem.data.encoded.example import Branch, Example
from tandem.data.ledger import Ledger
from tandem.data.records import Origin
from tandem.data.tokenize.chat_template import resolve_template
from tandem.recipe.data_source import DataSource

from .built import prepare_conversations, prepare_pairs


@dataclass
class Lasting:
    """How long to train."""

    epochs: float | None = None
    max_steps: int | None = None


def test_an_epoch_shows_every_example_once_in_a_new_order() -> None:
    taken = list(StepSampler(10, 4, seed=3).steps(0, 6))
    assert [len(step.examples) for step in taken] == [4, 4, 2, 4, 4, 2]
    first = [i for step in taken[:3] for i in step.examples]
    second = [i for step in taken[3:] for i in step.examples]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [step.epoch for step in taken] == [0, 0, 0, 1, 1, 1]


def test_starting_late_gives_the_same_steps() -> None:
    whole = list(StepSampler(10, 3, seed=1).steps(0, 9))
    assert list(StepSampler(10, 3, seed=1).steps(5, 9)) == whole[5:]
    assert list(StepSampler(10, 3, seed=2).steps(0, 9)) != whole


def test_total_steps() -> None:
    assert StepSampler(10, 4).total_steps(Lasting()) == 3
    assert StepSampler(10, 4).total_steps(Lasting(epochs=2.5)) == 8
    assert StepSampler(10, 4).total_steps(Lasting(max_steps=7)) == 7
    with pytest.raises(ValueError, match="positive"):
        StepSampler(0, 4)


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


def test_the_plan_of_a_known_step() -> None:
    # Costs 9 + 4 and 7 + 6 are even; neither rank's trees fit together.
    plan = plan_step([90, 70, 60, 40], [9, 7, 6, 4], 129, 2)
    assert plan.ranks == (((0,), (3,)), ((1,), (2,)))
    assert (plan.micro_batches, plan.imbalance) == (2, 1.0)
    assert plan.fill == pytest.approx((90 + 40 + 70 + 60) / 4 / 129)


def test_a_rank_with_fewer_micro_batches_splits_its_own() -> None:
    # The first rank's two trees do not fit together, those of the second would.
    plan = plan_step([60, 60, 10, 10], [5.2, 4.8, 5.1, 4.9], 100, 2)
    assert plan.ranks == (((0,), (1,)), ((2,), (3,)))
    assert plan.fill == pytest.approx((0.6 + 0.6 + 0.1 + 0.1) / 4)
    # Nothing to split: the third rank has no tree, and runs a micro-batch that counts nothing.
    alone = plan_step([100, 50], [100, 50], 40, 3)
    assert alone.ranks == (((0,),), ((1,),), ())
    assert (alone.micro_batches, alone.fill, alone.imbalance) == (1, 1.0, 2.0)


def test_every_tree_is_planned_once_within_the_budget_in_any_number_of_processes() -> None:
    rng = random.Random(2)
    for _ in range(100):
        ranks = rng.randint(1, 5)
        tokens = [rng.randint(1, 120) for _ in range(rng.randint(1, 40))]
        costs = [n + n * n / 100 for n in tokens]
        plan = plan_step(tokens, costs, 100, ranks)
        flat = [i for own in plan.ranks for members in own for i in members]
        assert sorted(flat) == list(range(len(tokens)))
        for own in plan.ranks:
            # Only a rank whose trees are all alone runs fewer.
            assert len(own) == plan.micro_batches or all(len(members) == 1 for members in own)
            for members in own:
                assert len(members) == 1 or sum(tokens[i] for i in members) <= 100
        assert plan == plan_step(list(tokens), list(costs), 100, ranks)


def test_dealing_beats_the_costliest_first_alone() -> None:
    # Costliest first, each to the rank with the least, ends at 14 to 10.
    shares = assign_to_ranks([6, 6, 4, 4, 4], 2)
    assert sorted(sum([6, 6, 4, 4, 4][i] for i in share) for share in shares) == [12, 12]


def test_a_trees_cost_counts_what_is_seen() -> None:
    def branch(length: int) -> Branch:
        return Branch(np.zeros(length, np.int32), np.zeros(length, bool))

    pair = Example(branch(10), (branch(4), branch(2)), Origin("made", 1))
    # Causal 10 x 10 / 2, then each branch on the prefix and itself.
    assert example_cost(pair, 0.0) == 16
    assert example_cost(pair, 1.0) == 16 + 50 + (40 + 8) + (20 + 2)


@pytest.fixture(scope="module")
def real(shared_data: Path, _mistral: Any) -> dict[str, Sequence[Example]]:
    """Real pairs and conversations as trees."""
    found = {}
    for name, prepare, path in (
        ("pairs", prepare_pairs, "pairs/orca_dpo_pairs.jsonl"),
        ("conversations", prepare_conversations, "conversations/slimorca_format.jsonl"),
    ):
        found[name] = prepare(
            [DataSource(path=str(shared_data / path))],
            tokenizer=_mistral,
            template=resolve_template(_mistral, "neural-chat"),
            max_length=2048,
            ledger=Ledger(None),
            limit=640,
        )
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", ["pairs", "conversations"])
def test_real_lengths_are_dealt_evenly_and_packed_near_the_bound(
    real: dict[str, Sequence[Example]], name: str, ranks: int
) -> None:
    trees, budget = real[name], 2048
    for step in StepSampler(len(trees), 64, seed=1).steps(0, len(trees) // 64):
        tokens = [trees[i].fed for i in step.examples]
        costs = [example_cost(trees[i], 4e-5) for i in step.examples]
        plan = plan_step(tokens, costs, budget, ranks)
        loads = [sum(costs[i] for members in own for i in members) for own in plan.ranks]
        assert max(loads) <= max(1.05 * sum(costs) / ranks, max(costs))
        assert plan.imbalance == pytest.approx(max(loads) * ranks / sum(costs))
        bound = math.ceil(sum(tokens) / budget / ranks)
        assert plan.micro_batches <= bound + 1
        # With as many micro-batches as the bound they cannot be fuller; one more costs its share.
        assert plan.fill > 0.97 * sum(tokens) / budget / ranks / (bound + 1)


PARTS = (
    WeightedSource(7, 0.5),
    WeightedSource(4),
    WeightedSource(5, 2.25),
    WeightedSource(0, 3.0),
    WeightedSource(3, 0.1),
)


def test_weights_of_one_change_nothing() -> None:
    plain = list(StepSampler(12, 5, seed=4).steps(0, 20))
    weighted = StepSampler(12, 5, seed=4, sources=(WeightedSource(5), WeightedSource(7)))
    assert list(weighted.steps(0, 20)) == plain
    assert weighted.total_steps(Lasting(epochs=2.5)) == 8


def test_after_any_epochs_every_record_came_as_often_as_its_weight_says() -> None:
    sampler = StepSampler(19, 4, seed=2, sources=PARTS)
    count = sampler.total_steps(Lasting(epochs=41))
    seen = Counter[int]()
    weights = [part.weight for part in PARTS for _ in range(part.examples)]
    epochs = itertools.groupby(sampler.steps(0, count), key=lambda step: step.epoch)
    for epoch, taken in epochs:
        shown = [i for step in taken for i in step.examples]
        assert len(shown) == sampler.epoch_size(epoch)
        seen.update(shown)
        for index, weight in enumerate(weights):
            exact = (epoch + 1) * Fraction(str(weight))
            assert math.floor(exact) <= seen[index] <= math.ceil(exact)
            assert shown.count(index) in (math.floor(weight), math.ceil(weight))
    assert epoch == 40


def test_half_a_source_is_another_half_every_epoch() -> None:
    parts = (WeightedSource(10, 0.5),)
    first, second, third = (
        [i for step in StepSampler(10, 5, seed=1, sources=parts).steps(0, 3) if step.epoch == epoch
         for i in step.examples]
        for epoch in range(3)
    )  # fmt: skip
    assert sorted(first + second) == list(range(10))
    assert sorted(third) == sorted(first)
    assert third != first
    turned = StepSampler(10, 5, seed=2, sources=parts).steps(0, 1)
    other = [i for step in turned for i in step.examples]
    assert sorted(other) != sorted(first)


def test_weighted_steps_may_start_late_and_are_counted() -> None:
    sampler = StepSampler(19, 4, seed=1, sources=PARTS)
    count = sampler.total_steps(Lasting(epochs=7.5))
    whole = list(sampler.steps(0, count))
    for start in range(count + 1):
        assert list(sampler.steps(start, count)) == whole[start:]
    assert whole[-1].epoch == 7
    assert sampler.epochs_after(count) >= 7.5
    assert sampler.epochs_after(whole.index(next(s for s in whole if s.epoch == 3))) == 3


def test_an_epoch_that_shows_nothing_is_passed() -> None:
    rare = (WeightedSource(2, 0.1),)
    sampler = StepSampler(2, 4, seed=1, sources=rare)
    taken = list(sampler.steps(0, 4))
    assert [step.epoch for step in taken] == [0, 5, 10, 15]
    assert Counter(i for step in taken for i in step.examples) == {0: 2, 1: 2}
    assert [step.number for step in taken] == [0, 1, 2, 3]
    assert sampler.total_steps(Lasting(epochs=1)) == 1


def test_copies_in_one_step_are_told_apart() -> None:
    (step,) = StepSampler(2, 9, seed=1, sources=(WeightedSource(2, 3.0),)).steps(0, 1)
    assert sorted(zip(step.examples, step.copies, strict=True)) == [
        (i, copy) for i in (0, 1) for copy in (0, 1, 2)
    ]
    keys = {record_key(1, 2, i, copy) for i in range(5) for copy in range(3)}
    assert len(keys) == 15
    assert record_key(1, 2, 3) == record_key(1, 2, 3, 0)


def test_parts_must_cover_the_examples() -> None:
    with pytest.raises(ValueError, match="cover"):
        StepSampler(5, 2, seed=1, sources=(WeightedSource(4, 2.0),))
