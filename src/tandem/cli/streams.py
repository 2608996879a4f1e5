"""The process's streams: what they cannot print is replaced or lost, but no command fails by it."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from tandem.errors import UserError

ERRORS = "tandem-plain"  # the error handler for characters that a stream's encoding lacks
# The characters of tables, bars and messages in ASCII; others become a question mark.
_PLAIN = {
    "▲": "^", "▼": "v", "→": "->", "–": "-", "—": "-", "−": "-", "≥": ">=", "±": "+-", "×": "x",
    "·": ".", "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"', "━": "-", "─": "-", "│": "|",
    "•": "*", "\u00a0": " ",
}  # fmt: skip
# Commands that write files: their work is done even if the output could not be printed.
_LEAVES_FILES = ("run", "sft", "merge", "pairs", "dpo", "eval", "report")


def plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace characters that a stream's encoding lacks; an error handler for `codecs`.

    A byte that was no UTF-8 is shown as `\\xe9`, another lone half of a character as `\\ud800`.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = []
    for character in error.object[error.start : error.end]:
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:
            shown.append(f"\\x{code - 0xDC00:02x}")
        elif 0xD800 <= code <= 0xDFFF:
            shown.append(f"\\u{code:04x}")
        else:
            shown.append(_PLAIN.get(character, "?"))
    return "".join(shown), error.end


class _LastingBytes(io.RawIOBase):
    """A stream's file descriptor. Writing to it never raises; `trouble` keeps the error."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.trouble: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        while self.trouble is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # who started us has made the descriptor non-blocking
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.trouble = error
        return len(data)


class Streams:
    """Prepare stdin, stdout and stderr of this process.

    A closed terminal, a reader that left and a full disk end no command: what is written from then
    on is lost. Closed descriptors are opened on the null device; otherwise the first opened file
    would get their numbers, and C libraries would print into it.
    """

    def __init__(self) -> None:
        codecs.register_error(ERRORS, plain)
        for descriptor in (0, 1, 2):
            try:
                os.fstat(descriptor)
            except OSError:
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if sys.stdin is None:
            sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        # Readers report a byte that is no UTF-8; see `chat.session`.
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")
        forget_empty_sizes()
        self._out, sys.stdout = _lasting(sys.stdout, 1)
        self._err, sys.stderr = _lasting(sys.stderr, 2)

    def settle(self, code: int, argv: Sequence[str]) -> int:
        """Write out what is left; return the exit code of a command line that ended with `code`.

        It changes only for a command whose only work is its output, when that was not written.
        """
        sys.stdout.flush()
        trouble = self._out.trouble
        if trouble is not None and trouble.errno != errno.EPIPE:  # `| head` has read enough
            dry = any(argument.replace("_", "-") == "--dry-run" for argument in argv)
            done = bool(argv) and argv[0] in _LEAVES_FILES and not dry
            kept = "; the files are written" if done and code == 0 else ""
            print(f"standard output: {trouble.strerror}; the output is cut{kept}", file=sys.stderr)
            code = code if done or code else UserError.exit_code
        sys.stderr.flush()
        return code


def forget_empty_sizes() -> None:
    """Remove sizes of 0 from the environment: tables of that width would be empty."""
    for name in ("COLUMNS", "LINES"):
        if os.environ.get(name, "").strip() == "0":
            del os.environ[name]


def _lasting(stream: TextIO | None, descriptor: int) -> tuple[_LastingBytes, TextIO]:
    raw = _LastingBytes(descriptor)
    old = stream if isinstance(stream, io.TextIOWrapper) else None
    if old is not None:
        old.flush()
    return raw, io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=old.encoding if old is not None else "utf-8",
        errors=ERRORS,
        line_buffering=old.line_buffering if old is not None else False,
        write_through=old.write_through if old is not None else False,
    )
