"""Charts of the results: the report's own, as files that stand alone in light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tandem.report.plots import HEIGHT, WIDTH, Bar, Series, bar_chart, line_chart

# Notes behind bars are longer than the report's, for which its charts have room.
_MARGIN, _TITLE, _NOTES = 24, 34, 60
# The report page's colours; an image sees the reader's scheme, not the page's style sheet.
_STYLE = """
.sheet { fill: #ffffff; } .ink { fill: #1d2127; }
text { font: 11.5px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  fill: #626973; }
.title { font-size: 14px; font-weight: 600; fill: #1d2127; }
.value { font-weight: 600; font-size: 12px; fill: #1d2127; }
.name { fill: #1d2127; } .note { fill: #737b85; }
.grid-line { stroke: #e4e5e3; } .zero { stroke: #8d949e; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
.fill { fill: currentColor; } .dot { fill: currentColor; }
.tone-blue { color: #2f6fd0; } .tone-teal { color: #12857a; } .tone-rose { color: #cc3d63; }
text.value[class*="tone-"] { fill: currentColor; }
@media (prefers-color-scheme: dark) {
  .sheet { fill: #1b1f25; } text { fill: #a0a8b2; } .note { fill: #78818c; }
  .title, .value, .name { fill: #e6e8ea; }
  .grid-line { stroke: #2d333b; } .zero { stroke: #78818c; }
  .tone-blue { color: #6ea5f5; } .tone-teal { color: #45c0b0; } .tone-rose { color: #f0809c; }
}
"""


def speed_chart(title: str, rows: Sequence[tuple[str, float, float | None, float]]) -> str:
    """Bars of how many times faster tandem is than each rung.

    Args:
        title: above the bars.
        rows: rung, with the reference included, in the loop or None, share of the memory.
    """
    bars = [
        Bar(
            label,
            included,
            f"{included:.1f}x"
            + (f", in the loop {loop:.1f}x" if loop else "")
            + f", memory {memory:.2f}x",
            "teal",
        )
        for label, included, loop, memory in rows
    ]
    chart = bar_chart(bars, label=title)
    return _standing([(f"{title}: tandem is faster by", chart, 46 * len(bars))], title)


def sweep_chart(panels: Sequence[tuple[str, str, Sequence[Series]]]) -> str:
    """Panels below each other: a title, what runs along x, and lines of ratios."""
    drawn = [
        (
            title,
            line_chart(
                lines, label=title, x_label=along, y_format=lambda y: f"{y:.2f} ×", from_zero=True
            ),
            HEIGHT,
        )
        for title, along, lines in panels
    ]
    return _standing(drawn, "tandem against the plain loop")


def _standing(charts: Sequence[tuple[str, str, int]], label: str) -> str:
    """Charts as one SVG file with its own ground and colours."""
    parts, y = [], _MARGIN
    for title, chart, height in charts:
        parts.append(f'<text class="title" x="{_MARGIN}" y="{y + 12}">{escape(title)}</text>')
        place = f'<svg x="{_MARGIN}" y="{y + _TITLE}" width="{WIDTH}" height="{height}" '
        parts.append(chart.replace("<svg ", place + 'overflow="visible" ', 1))
        y += _TITLE + height + _MARGIN
    wide = WIDTH + _NOTES + 2 * _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{y}" '
        f'viewBox="0 0 {wide} {y}" role="img" aria-label="{escape(label, quote=True)}">'
        f'<style>{_STYLE}</style><rect class="sheet" width="{wide}" height="{y}" rx="10"/>'
        + "".join(parts)
        + "</svg>\n"
    )
