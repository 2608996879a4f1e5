"""The errors that tandem raises on purpose, and the exit code of each.

TandemError            1
├── NotFinite          1   training came to a loss or gradient that is NaN or infinite
├── UserError          2   the user's mistake: one tidy message, no traceback
└── Stopped            3   interrupted; the same command resumes the run
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TandemError(Exception):
    """Base of errors reported without a traceback; `reported` if another process has done so."""

    exit_code = 1
    reported = False

    def _render_traceback_(self) -> list[str]:
        """Return what a notebook shows: the message alone, as a terminal does."""
        return [f"{type(self).__name__}: {self}"]


class NotFinite(TandemError):  # noqa: N818 - what was found, as the others are named
    """Training came to a loss or a gradient that is not finite; the message names the records."""


class UserError(TandemError):
    """A user's mistake; the message says what happened, where (file, row or key) and what to do."""

    exit_code = 2


class Stopped(TandemError):  # noqa: N818 - no error, but the way a run ends early
    """The run was interrupted; all that is needed to resume it is on disk."""

    exit_code = 3


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a hint that names the nearest of some names, in any case; empty without a near one."""
    spelled = {one.lower(): one for one in names}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=0.5)
    return f" Did you mean {spelled[close[0]]!r}?" if close else ""


def require(package: str, extra: str, why: str) -> None:
    """Raise UserError unless `package`, which tandem's `extra` installs, is here.

    `why` is what needs it, as the beginning of a sentence: `engine: deepspeed-zero2`.
    """
    from importlib import metadata  # not every start needs it

    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"{why} needs the package {package}, which is not installed here. Install it with "
            f"pip install '.[{extra}]' in the folder of tandem's sources"
        ) from None
