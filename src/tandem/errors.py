"""The errors that tandem raises on purpose, and the exit code each ends a command with.

TandemError            1
├── UserError          2   the user's mistake: one tidy message, no traceback
└── Stopped            3   interrupted; the same command again goes on
"""

from __future__ import annotations


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
