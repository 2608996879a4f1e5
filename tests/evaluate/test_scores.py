"""Standard errors and paired differences, against the textbook's formulas."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from tandem.evaluate.scores import Score, difference, per_item, score_of


def test_a_mean_has_the_standard_error_of_the_mean() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    score = per_item(values)
    assert score.value == pytest.approx(0.6)
    assert score.error == pytest.approx(statistics.stdev(values) / math.sqrt(5))


def test_a_paired_difference_has_the_error_of_the_differences() -> None:
    rng = random.Random(0)
    one, other = ([float(rng.random() < p) for _ in range(50)] for p in (0.7, 0.5))
    found = difference(per_item(one), per_item(other))
    assert found is not None
    differences = [a - b for a, b in zip(one, other, strict=True)]
    assert found[0] == pytest.approx(statistics.mean(differences))
    assert found[1] == pytest.approx(statistics.stdev(differences) / math.sqrt(50))


def test_the_error_of_a_mean_per_token_is_what_resampling_gives() -> None:
    rng = random.Random(1)
    weights = [float(rng.randint(3, 40)) for _ in range(200)]
    one = [w * (2.0 + rng.gauss(0, 0.5)) for w in weights]
    other = [v - w * (0.1 + rng.gauss(0, 0.05)) for v, w in zip(one, weights, strict=True)]
    ours = per_item(one, weights)
    paired = difference(ours, per_item(other, weights))
    assert ours.value == pytest.approx(sum(one) / sum(weights))
    assert ours.error is not None
    assert paired is not None
    assert paired[1] is not None
    means, gaps = [], []
    for _ in range(2000):
        drawn = [rng.randrange(200) for _ in range(200)]
        total = sum(weights[i] for i in drawn)
        means.append(sum(one[i] for i in drawn) / total)
        gaps.append(sum(one[i] - other[i] for i in drawn) / total)
    assert ours.error == pytest.approx(statistics.stdev(means), rel=0.1)
    assert paired[1] == pytest.approx(statistics.stdev(gaps), rel=0.1)
    assert paired[1] < ours.error / 2  # the items' difficulty is shared


def test_only_the_same_items_are_compared() -> None:
    one = Score(("a", "b"), (1.0, 0.0))
    assert difference(one, Score(("a", "c"), (1.0, 0.0))) is None
    assert difference(one, Score(("a",), (1.0,))) is None
    # A figure that is no mean of its items, as the harness states some, has no paired error.
    assert difference(one, Score(("a", "b"), (1.0, 0.0), (), (0.9, 0.1))) is None


def test_one_item_has_no_error() -> None:
    assert per_item([1.0]).error is None
    assert difference(per_item([1.0]), per_item([0.0])) == (1.0, None)


def test_a_score_survives_its_file() -> None:
    for score in (per_item([1.0, 2.0], [3.0, 4.0]), Score(("a",), (1.0,), (), (1.0, None))):
        assert score_of(score.as_json()) == score
