"""The errors that tandem raises on purpose, and the exit code each ends a command with.

TandemError            1
├── UserError          2   the user's mistake: one tidy message, no traceback
└── Stopped            3   interrupted; the same command again goes on
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TandemError(Exception):
    """Base of the errors that a command reports without a traceback.

    `told` is set where another process of the same run reports it.
    """

    exit_code = 1
    told = False


class UserError(TandemError):
    """A mistake in a recipe, a flag, a file or a model folder.

    The message says what happened, where (file, row or key) and what to do.
    """

    exit_code = 2


class Stopped(TandemError):  # noqa: N818 - no error, but the way a run ends early
    """The run was interrupted, everything needed to go on is on disk."""

    exit_code = 3


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for a message that names the nearest of some names, in any case; or nothing."""
    spelled = {one.lower(): one for one in names}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    return f" Did you mean {spelled[close[0]]!r}?" if close else ""
