"""Charts: well-formed SVG, right geometry, broken lines where values are not finite."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from tandem.report.plots import Bar, Series, bar_chart, histogram, line_chart, smoothing_window
from tandem.report.plots import _ticks as ticks


def numbers(text: str) -> list[float]:
    return [float(n) for n in re.findall(r"-?[\d.]+", text)]


def elements(svg: str, kind: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if kind in e.get("class", "").split()]


def test_line_goes_through_its_points() -> None:
    svg = line_chart([Series("loss", [0, 1, 2], [0.0, 2.0, 4.0])], label="loss")
    (line,) = elements(svg, "line")
    x0, y0, x1, y1, x2, y2 = numbers(line.get("d", ""))
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(y1 - y2)
    assert y0 > y2  # up is more
    assert (x0, x2, y0, y2) == (52, 478, 196, 14)


def test_not_finite_values_break_the_line() -> None:
    svg = line_chart([Series("a", range(5), [1.0, 2.0, math.nan, 1.0, math.inf])], label="a")
    (line,) = elements(svg, "line")
    assert line.get("d", "").count("M") == 2
    assert "nan" not in svg
    assert "inf" not in svg


def test_nothing_to_draw() -> None:
    assert line_chart([], label="a") == ""
    assert line_chart([Series("a", [1], [math.nan])], label="a") == ""
    assert histogram([], label="a", x_label="tokens") == ""
    assert bar_chart([], label="a") == ""


def test_single_and_constant_values() -> None:
    for ys in ([3.0], [3.0, 3.0], [0.0, 0.0], [-2.0, -2.0]):
        svg = line_chart([Series("a", range(len(ys)), ys)], label="a")
        assert all(math.isfinite(n) for n in numbers(svg))


def test_names_are_escaped() -> None:
    svg = line_chart([Series("<b>", [1, 2], [1, 2]), Series('"&', [1, 2], [2, 1])], label='<"x">')
    names = [e.text for e in elements(svg, "name")]
    assert names == ["<b>", '"&']


def test_names_of_many_lines_have_rows_within_the_chart() -> None:
    lines = [Series(f"{'data/' * (3 * n)}{n}.jsonl", [0, 1], [n, n + 1]) for n in range(8)]
    svg = line_chart(lines, label="a")
    _, first, width, _ = map(float, ElementTree.fromstring(svg).get("viewBox", "").split())
    names = elements(svg, "name")
    assert len(names) == 8
    assert len({e.get("y") for e in names}) > 2
    assert all(float(e.get("x", "")) + 6.6 * len(e.text or "") <= width for e in names)
    assert min(float(e.get("y", "")) for e in names) > first
    assert max(float(e.get("y", "")) for e in names) < min(
        float(e.get("cy", "")) for e in elements(svg, "dot")
    )


def test_long_runs_are_thinned_and_smoothed() -> None:
    n = 5000
    svg = line_chart([Series("a", range(n), [math.sin(i) for i in range(n)])], label="a")
    assert len(elements(svg, "dot")) == 400
    assert len(elements(svg, "raw")) == 1
    assert smoothing_window(39) == 1
    assert smoothing_window(40) == 3
    assert smoothing_window(n) == 21


def test_end_labels_do_not_overlap() -> None:
    lines = [Series(str(i), [0, 1], [0, 5 + i / 1000]) for i in range(3)]
    ys = sorted(float(e.get("y", "")) for e in elements(line_chart(lines, label="a"), "value"))
    assert min(b - a for a, b in pairwise(ys)) >= 12.9


def test_histogram_counts_everything() -> None:
    svg = histogram([0, 1, 1, 5, 99, 100], label="lengths", x_label="tokens", limit=100)
    shown = [int((e.findtext("title") or "").rsplit(": ")[1]) for e in elements(svg, "fill")]
    assert sum(shown) == 6
    assert len(elements(svg, "limit")) == 1
    assert not elements(histogram([1, 2], label="a", x_label="t", limit=500), "limit")


def test_bars_are_to_scale() -> None:
    svg = bar_chart([Bar("fed", 50, "50"), Bar("padded", 100, "100, 2.00×")], label="saved")
    a, b = (float(e.get("width", "")) for e in elements(svg, "fill"))
    assert b == pytest.approx(2 * a)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.69), (-40, -12), (1e-6, 3e-4), (5, 5)])
def test_ticks_cover_the_range(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 7


def test_steps_have_whole_ticks() -> None:
    svg = line_chart([Series("a", range(1, 11), range(10))], label="a", y_format=lambda y: "")
    shown = [e.text for e in elements(svg, "tick") if e.text]
    assert shown == ["3", "6", "9"]
