"""Where commands print: results to stdout, everything about the way there to stderr."""

from __future__ import annotations

from rich.console import Console


def notice_console() -> Console:
    """The console for progress and notices."""
    return Console(stderr=True, highlight=False)


def result_console() -> Console:
    """The console for what a command is asked for."""
    return Console(highlight=False)
