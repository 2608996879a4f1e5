"""Quantiles and bars, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tandem.check.survey_result import Lengths


def _of(values: list[int]) -> Lengths:
    lengths = Lengths("tokens")
    lengths.add({"whole": np.array(values[:2], dtype=np.int32)})
    lengths.add({"whole": np.array(values[2:], dtype=np.int32)})
    return lengths


def test_a_measure_is_what_counting_gives() -> None:
    found = _of([5, 1, 100, 3, 4]).measures()["whole"]
    assert (found.least, found.median, found.most, found.total) == (1, 4, 100, 113)
    assert found.mean == 22.6
    assert (found.p95, found.p99) == (5, 5)


@pytest.mark.parametrize(
    "values",
    [[2], [0], [0, 0, 1], [7, 7, 7], list(range(1000)), [3] * 500 + [90_000], [1, 99], [140, 1]],
)
def test_every_record_is_in_one_bar(values: list[int]) -> None:
    histogram = _of(values).histogram()
    assert histogram is not None
    edges, counts = histogram.edges, histogram.counts
    assert sum(counts) == len(values)
    assert len(edges) == len(counts) + 1 <= 17
    assert list(edges) == (sorted(set(edges)) if min(values) < max(values) else [values[0]] * 2)
    assert counts[0] > 0
    for number, count in enumerate(counts):
        low, high = edges[number], edges[number + 1]
        last = number == len(counts) - 1
        assert count == sum(low <= v < high or (last and v == high) for v in values)


def test_nothing_has_no_bars() -> None:
    assert Lengths("tokens").histogram() is None
    assert Lengths("tokens").measures() == {}
