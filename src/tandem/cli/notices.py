"""Where commands print: results to stdout, everything about the way there to stderr."""

from __future__ import annotations

from rich.console import Console

from tandem.train.launch import launched


def notice_console() -> Console:
    """The console for progress and notices; of several processes, rank 0 alone has one."""
    return Console(stderr=True, highlight=False, quiet=launched().rank > 0)


def result_console() -> Console:
    """The console for what a command is asked for."""
    return Console(highlight=False)
