"""How results look in a notebook: small tables, charts and whole pages as HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from io import StringIO
from math import ceil
from pathlib import Path

from rich.console import Console

_CHART_WIDTH, _CHART_HEIGHT, _PAGE_HEIGHT = 520, 310, 700  # pixels
_BESIDE = 2  # charts beside each other
_WIDTH = 100  # columns of a text


@dataclass(frozen=True)
class Page:
    """A page on disk, which a notebook shows."""

    path: Path

    def __fspath__(self) -> str:
        """The page's path."""
        return str(self.path)

    def __str__(self) -> str:
        """The page's path."""
        return str(self.path)

    def _repr_html_(self) -> str:
        return frame(self.path.read_text(encoding="utf-8"), _PAGE_HEIGHT)


@dataclass(frozen=True)
class Html:
    """A piece of a page, which a notebook shows."""

    text: str

    def _repr_html_(self) -> str:
        return self.text


def frame(page: str, height: int) -> str:
    """Return a whole HTML page in a frame of its own, so that its styles stay its own."""
    attributes = f'width="100%" height="{height}" frameborder="0"'
    return f'<div><iframe srcdoc="{escape(page)}" {attributes}></iframe></div>'


def charts(figures: Iterable[tuple[str, str, str]]) -> str:
    """Return charts in a frame, with the styles of the report; (title, caption, svg) each."""
    drawn = [
        f'<figure class="sheet"><h3>{escape(title)}</h3><p>{escape(caption)}</p>{svg}</figure>'
        for title, caption, svg in figures
    ]
    if not drawn:
        return ""
    style = (files("tandem.report") / "page.css.jinja").read_text(encoding="utf-8")
    width = f"max-width:{_CHART_WIDTH * min(len(drawn), _BESIDE)}px"
    grid = f'<div class="grid" style="{width}">{"".join(drawn)}</div>'
    return frame(
        f"<!doctype html><style>{style}</style>{grid}", _CHART_HEIGHT * ceil(len(drawn) / _BESIDE)
    )


def table(rows: Iterable[Sequence[object]], head: Sequence[object] = ()) -> str:
    """Return a table of escaped cells, the first of each row as its name."""
    lines = []
    if head:
        cells = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
        lines.append(f"<tr>{cells}</tr>")
    for name, *others in rows:
        cells = "".join(f'<td style="text-align:left">{escape(str(cell))}</td>' for cell in others)
        lines.append(f'<tr><th style="text-align:left">{escape(str(name))}</th>{cells}</tr>')
    return f"<table>{''.join(lines)}</table>"


def preformatted(text: str) -> str:
    """Return a text as it is, in a fixed width."""
    return f"<pre>{escape(text)}</pre>"


def printed(write: Callable[[Console], None]) -> str:
    """Return what a function prints on a console, without colours."""
    file = StringIO()
    write(
        Console(
            file=file,
            width=_WIDTH,
            no_color=True,
            highlight=False,
            force_jupyter=False,
            force_terminal=False,
        )
    )
    return file.getvalue().rstrip("\n")
