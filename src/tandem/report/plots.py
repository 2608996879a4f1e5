"""Small SVG charts as strings, from numbers.

Colours are classes (`tone-teal`, `axis`, ...) that have a light and a dark value in the page's
style sheet. All outside text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from tandem.wording import number, short_count

WIDTH, HEIGHT = 540, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 62, 14, 34
_LEGEND = 18  # more room at the top for each row of names, when several lines need some
_CHARACTER = 6.6  # width of one in a name
_MAX_POINTS = 400
_SMOOTH_FROM = 40
_STEPS = 4  # an axis has about so many


@dataclass(frozen=True)
class Series:
    """A named line: `tone` is a colour of the page (blue, teal, rose, amber, violet).

    `stroke` is dashed or dotted where lines share a colour.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    tone: str = "blue"
    stroke: str = ""


@dataclass(frozen=True)
class Bar:
    """A horizontal bar: `note` is printed behind it."""

    label: str
    value: float
    note: str
    tone: str = "blue"


@dataclass(frozen=True)
class _Frame:
    """Maps data to the plot's inner rectangle."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    top: float = _TOP

    def x(self, value: float) -> float:
        span = (self.x_high - self.x_low) or 1.0
        return _LEFT + (value - self.x_low) / span * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        span = (self.y_high - self.y_low) or 1.0
        return HEIGHT - _BOTTOM - (value - self.y_low) / span * (HEIGHT - self.top - _BOTTOM)


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "step",
    y_format: Callable[[float], str] = number,
    from_zero: bool = False,
    named: bool = True,
) -> str:
    """Draw lines over a common axis, each named and labelled with its last value.

    Lines are not `named` where the page has their names and last values elsewhere.

    Values that are not finite break the line. From 40 points on, the bold line is a centred
    running mean (see `smoothing_window`) over the thin line of the logged values; more than 400
    points are averaged in equal buckets. Returns an empty string without finite values.
    """
    points = [(s, _thin(_finite(s.xs, s.ys))) for s in series]
    points = [(s, p) for s, p in points if any(math.isfinite(y) for _, y in p)]
    if not points:
        return ""
    xs = [x for _, p in points for x, _ in p]
    ys = [y for _, p in points for _, y in p if math.isfinite(y)]
    ticks = _ticks(min([0.0, *ys]) if from_zero else min(ys), max(ys))
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    rows = _legend_rows([(s.name, s.tone) for s, _ in points]) if named and len(points) > 1 else []
    top = _TOP + _LEGEND * len(rows)
    extra = _LEGEND * max(0, len(rows) - 2)  # two rows leave the lines enough room
    frame = _Frame(x_low, x_high, ticks[0], ticks[-1], top - extra)
    x_ticks = [x for x in _ticks(x_low, x_high, whole=_whole(xs)) if x_low <= x <= x_high]
    parts = [_y_axis(frame, ticks, y_format), _x_axis(frame, x_ticks, x_label)]
    ends: list[tuple[float, str, str]] = []
    for one, path in points:
        parts.append(_line(frame, one, path, y_format, x_label))
        last = [y for _, y in _smooth(path) if math.isfinite(y)][-1]
        ends.append((frame.y(last), y_format(last), one.tone))
    if named:
        parts += _end_labels(ends)
    legend = "".join(_legend(row, 11 - extra + _LEGEND * place) for place, row in enumerate(rows))
    return _svg([*parts, legend], label, above=extra)


def histogram(
    values: Sequence[float],
    *,
    label: str,
    x_label: str,
    tone: str = "blue",
    limit: float | None = None,
    bins: int = 28,
) -> str:
    """Draw counts in equal bins from zero on, and a dashed line at a length `limit`.

    Returns an empty string without values.
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    # The limit is only worth axis space when the data comes near it.
    show_limit = limit is not None and limit <= 1.6 * max(finite)
    top = max([*finite, limit or 0.0] if show_limit else finite) or 1.0
    width = max(1, math.ceil(top / bins)) if _whole(finite) else top / bins
    number_of_bins = max(1, math.floor(top / width) + 1)
    counts = [0] * number_of_bins
    for v in finite:
        counts[min(int(v / width), number_of_bins - 1)] += 1
    x_high = number_of_bins * width
    ticks = _ticks(0, max(counts), whole=True)
    frame = _Frame(0, x_high, 0, ticks[-1])
    x_ticks = [x for x in _ticks(0, x_high, whole=_whole(finite)) if x <= x_high]
    parts = [_y_axis(frame, ticks, short_count), _x_axis(frame, x_ticks, x_label)]
    for i, n in enumerate(counts):
        left, right, y = frame.x(i * width), frame.x((i + 1) * width), frame.y(n)
        title = f"{number(i * width)} to {number((i + 1) * width)}: {n}"
        parts.append(
            f'<rect class="fill tone-{tone}" x="{left + 0.5:.1f}" y="{y:.1f}" rx="1.5" '
            f'width="{max(right - left - 1, 0.8):.1f}" height="{frame.y(0) - y:.1f}">'
            f"<title>{title}</title></rect>"
        )
    if show_limit and limit is not None:
        x = frame.x(limit)
        parts.append(_rule("limit", x, _TOP - 4, x, HEIGHT - _BOTTOM))
        parts.append(_text("note", x + 5, _TOP + 4, f"limit {limit:g}"))
    return _svg(parts, label)


def bar_chart(bars: Sequence[Bar], *, label: str) -> str:
    """Draw horizontal bars to one scale, each with its label above and its note behind."""
    if not bars:
        return ""
    highest = max(max(b.value for b in bars), 1e-12)
    room, row = WIDTH - 170, 46
    parts = []
    for i, bar in enumerate(bars):
        y = i * row
        length = max(room * bar.value / highest, 2)
        parts.append(_text("name", 0, y + 13, bar.label))
        parts.append(
            f'<rect class="fill tone-{bar.tone}" x="0" y="{y + 19}" rx="3" '
            f'width="{length:.1f}" height="16"/>'
        )
        parts.append(_text("value", length + 8, y + 31, bar.note))
    return _svg(parts, label, height=row * len(bars))


def swatch(one: Series) -> str:
    """Draw a short piece of a line, for a legend."""
    kind = escape(f"line tone-{one.tone} {one.stroke}".rstrip(), quote=True)
    return f'<svg class="swatch" viewBox="0 0 24 8">{_rule(kind, 1, 4, 23, 4)}</svg>'


def smoothing_window(points: int) -> int:
    """Return how many logged values the bold line averages: odd, 1 below 40 points."""
    shown = min(points, _MAX_POINTS)
    return 1 if shown < _SMOOTH_FROM else 2 * (shown // 40) + 1


def _finite(xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    return [(x, y if math.isfinite(y) else math.nan) for x, y in zip(xs, ys, strict=True)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= _MAX_POINTS:
        return points
    thinned = []
    for i in range(_MAX_POINTS):
        bucket = points[i * len(points) // _MAX_POINTS : (i + 1) * len(points) // _MAX_POINTS]
        ys = [y for _, y in bucket if math.isfinite(y)]
        thinned.append((bucket[-1][0], sum(ys) / len(ys) if ys else math.nan))
    return thinned


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    half = smoothing_window(len(points)) // 2
    smoothed = []
    for i, (x, y) in enumerate(points):
        # A window that shrinks equally at both ends keeps a trend's ends where they are.
        reach = min(half, i, len(points) - 1 - i)
        near = [v for _, v in points[i - reach : i + reach + 1] if math.isfinite(v)]
        smoothed.append((x, sum(near) / len(near) if near and math.isfinite(y) else math.nan))
    return smoothed


def _line(
    frame: _Frame,
    one: Series,
    points: list[tuple[float, float]],
    y_format: Callable[[float], str],
    x_label: str,
) -> str:
    parts = []
    if smoothing_window(len(points)) > 1:
        parts.append(f'<path class="raw tone-{one.tone}" d="{_path(frame, points)}"/>')
    kind = f"line tone-{one.tone} {one.stroke}".rstrip()
    parts.append(f'<path class="{kind}" d="{_path(frame, _smooth(points))}"/>')
    for x, y in points:
        if math.isfinite(y):
            title = f"{one.name} {y_format(y)}, {x_label} {number(x)}"
            parts.append(_dot(f"dot tone-{one.tone}", frame.x(x), frame.y(y), title))
    if len(points) == 1:
        x, y = points[0]
        parts.append(_dot(f"fill tone-{one.tone}", frame.x(x), frame.y(y), ""))
    return "".join(parts)


def _path(frame: _Frame, points: list[tuple[float, float]]) -> str:
    commands, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            commands.append(f"{pen}{frame.x(x):.1f} {frame.y(y):.1f}")
            pen = "L"
        else:
            pen = "M"
    return "".join(commands)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Return round numbers that cover low..high, in about `_STEPS` steps of 1, 2, 2.5 or 5 x 10^k.

    `whole` keeps them to whole numbers, for counts and steps.
    """
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        margin = abs(high) * 0.5 or 1.0
        low, high = low - (margin if low < 0 else min(margin, low)), high + margin
    raw = (high - low) / _STEPS
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _whole(values: Sequence[float]) -> bool:
    return all(value == int(value) for value in values)


def _y_axis(frame: _Frame, ticks: list[float], y_format: Callable[[float], str]) -> str:
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        parts.append(_rule("zero" if tick == 0 else "grid-line", _LEFT, y, WIDTH - _RIGHT, y))
        parts.append(_text("tick", _LEFT - 8, y + 3.5, _tick(tick, y_format), anchor="end"))
    return "".join(parts)


def _x_axis(frame: _Frame, ticks: list[float], x_label: str) -> str:
    y = HEIGHT - _BOTTOM + 16
    parts = [_text("tick", frame.x(t), y, short_count(t), anchor="middle") for t in ticks]
    return "".join([*parts, _text("note", WIDTH - _RIGHT + 18, y, x_label)])


def _tick(value: float, y_format: Callable[[float], str]) -> str:
    """Write a tick, a round number, without the digits that only a measured value needs."""
    text = y_format(value)
    mantissa, _, exponent = text.partition("e")
    if exponent:
        return f"{float(mantissa):g}e{int(exponent)}"
    figure, space, unit = text.partition(" ")
    if "." in figure and figure.replace(".", "").lstrip("-").isdigit():
        figure = figure.rstrip("0").rstrip(".")
    return figure + space + unit


def _end_labels(ends: list[tuple[float, str, str]]) -> list[str]:
    """Place the lines' last values at their ends, pushed apart downwards, at the bottom back up."""
    placed: list[tuple[float, str, str]] = []
    for y, text, tone in sorted(ends):
        placed.append((max(y, placed[-1][0] + 13) if placed else y, text, tone))
    over = max(placed[-1][0] - (HEIGHT - _BOTTOM), 0.0)
    return [
        _text(f"value tone-{tone}", WIDTH - _RIGHT + 8, y - over + 4, text)
        for y, text, tone in placed
    ]


def _legend_rows(names: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Names with their tones, in rows that fit into the chart's width; the longest are cut."""
    most = int((WIDTH - _LEFT - 22) / _CHARACTER)
    rows: list[list[tuple[str, str]]] = []
    left = 0.0
    for name, tone in names:
        shown = name if len(name) <= most else f"…{name[1 - most :]}"
        wide = 42 + _CHARACTER * len(shown)
        if not rows or wide - 20 > left:
            rows.append([])
            left = WIDTH - _LEFT
        rows[-1].append((shown, tone))
        left -= wide
    return rows


def _legend(names: list[tuple[str, str]], y: float) -> str:
    parts, x = [], float(_LEFT)
    for name, tone in names:
        parts.append(_rule(f"line tone-{tone}", x, y, x + 16, y))
        parts.append(_text("name", x + 22, y + 4, name))
        x += 42 + _CHARACTER * len(name)
    return "".join(parts)


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _rule(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dot(kind: str, x: float, y: float, title: str) -> str:
    inside = f"<title>{escape(title)}</title>" if title else ""
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4">{inside}</circle>'


def _svg(parts: list[str], label: str, height: int = HEIGHT, above: int = 0) -> str:
    """The whole chart, with `above` more room over its origin."""
    return (
        f'<svg viewBox="0 {-above} {WIDTH} {height + above}" role="img" '
        f'aria-label="{escape(label, quote=True)}">' + "".join(parts) + "</svg>"
    )
