"""What each call of the API does first, as the commands do: environment, console, processes."""

from __future__ import annotations

import os
import sys

from rich.console import Console

from tandem.errors import UserError
from tandem.integrations.choose import prepare_devices
from tandem.recipe.run_settings import RunSettings
from tandem.runtime.console import log, notice_console
from tandem.runtime.launch import forget_accelerates_settings, launched


def open_console(*, quiet: bool) -> Console:
    """Return the console for progress: standard error, or a notebook's own output.

    In a notebook there are plain lines and no bars, because it would keep each state of a bar.
    """
    if quiet:
        return Console(quiet=True)
    if not in_notebook():
        return notice_console()
    return Console(
        highlight=False,
        force_jupyter=False,
        force_terminal=False,
        no_color=True,
        quiet=launched().rank > 0,
    )


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this code."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def prepare(run: RunSettings, console: Console) -> None:
    """Set what torch and devices read in the environment, before torch is imported."""
    # Otherwise OpenMP's threads spin while they wait, see `cli/main.py`.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for notice in (*forget_accelerates_settings(), *prepare_devices(run)):
        log(console, notice)


def require_alone(call: str) -> None:
    """Raise UserError if a launcher has started several processes, which all make this call."""
    if (count := launched().count) > 1:
        raise UserError(
            f"{call}() works in one process, and a launcher started {count}; call it in a script "
            "of its own. tandem.sft, tandem.dpo, tandem.run and merge() work in several"
        )
