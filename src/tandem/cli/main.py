"""The `tandem` command: find the subcommand, run it, turn errors into exit codes.

0 done, 1 a bug, 2 the user's mistake, 3 stopped and resumable. Each subcommand imports what it
needs when it runs, so that `tandem --help` is instant.
"""

from __future__ import annotations

import atexit
import ctypes
import difflib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from tandem import __version__
from tandem.cli.parser import Parser
from tandem.cli.streams import Streams
from tandem.errors import Stopped, TandemError, UserError
from tandem.runtime.launch import forget_accelerates_settings, launched, without_local_rank

COMMANDS: dict[str, tuple[str, str, str]] = {
    "run": ("tandem.cli.run", "run", "the whole pipeline of a recipe, resumable"),
    "sft": ("tandem.cli.train", "sft", "stage 1: supervised fine-tuning"),
    "merge": ("tandem.cli.train", "merge", "an adapter into its base model, verified"),
    "pairs": ("tandem.cli.pairs", "pairs", "preference pairs: rejected answers by a weaker model"),
    "dpo": ("tandem.cli.train", "dpo", "stage 2: Direct Preference Optimization"),
    "sweep": ("tandem.cli.sweep", "sweep", "DPO with several values, compared on held-out pairs"),
    "check": ("tandem.cli.check", "check", "what is in a data set, before anything is trained"),
    "show": ("tandem.cli.show", "show", "one record as tokens: what is trained, and what is not"),
    "rehearse": ("tandem.cli.rehearse", "rehearse", "the whole run in minutes, on a stand-in"),
    "recipes": ("tandem.cli.recipes", "recipes", "the recipes that ship; copy one to change it"),
    "plan": ("tandem.cli.plan", "plan", "what a recipe would do and take, before it starts"),
    "eval": ("tandem.cli.evaluate", "evaluate", "measure models on tasks and on data of your own"),
    "chat": ("tandem.cli.chat", "chat", "talk to a model, or to several side by side"),
    "export": ("tandem.cli.export", "export", "a GGUF file or an Ollama folder, compared"),
    "report": ("tandem.cli.report", "report", "rebuild a run's report.html"),
    "cache": ("tandem.cli.report", "cache", "show or empty the cache"),
}
"""Each command's module, function and help."""
_IN_SEVERAL = ("run", "sft", "dpo", "sweep")  # commands that work in several processes
# Errors of the file system, and what the user can do about them.
_FOLDER_TROUBLE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check its rights, or choose another path"),
    **dict.fromkeys((errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG), "choose another path"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there and run again"),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EREMOTEIO, errno.ETIMEDOUT),
        "the disk or file server failed; look at it, then run again",
    ),
    errno.EISDIR: "move this folder away: a file belongs there",
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), "move it away, or choose another path"),
    errno.ELOOP: "remove this link",
}
# The message of Python's tempfile if no folder takes a file; its error number is misleading.
_NO_SCRATCH = "No usable temporary directory"


def main(argv: Sequence[str]) -> int:
    """Run one command line, without the program's name, and return the exit code."""
    # torch reads it when it is imported. Otherwise OpenMP's threads spin while they wait; with
    # another program on one of the cores, small models then train many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _dispatch(list(argv))
    except SystemExit as stop:  # argparse after --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except TandemError as error:
        _settle()
        # Until the processes are in contact, all find the same error, and the first of a machine
        # reports it; from then on the error knows, see `ProcessGroup`.
        if not error.reported and (_in_contact() or _speaks()):
            _complain(f"{'stopped' if isinstance(error, Stopped) else 'error'}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _settle()
        if _speaks():
            _complain("stopped by the keyboard; the same command resumes the run")
        return Stopped.exit_code
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FOLDER_TROUBLE:
            way_out = _FOLDER_TROUBLE[error.errno]
            _complain(f"error: {error.filename or 'a file'}: {error.strerror}; {way_out}")
            return UserError.exit_code
        if isinstance(error, FileNotFoundError) and _NO_SCRATCH in str(error):
            _complain(f"error: {error.strerror}; make room there, or set TMPDIR to another folder")
            return UserError.exit_code
        _settle()
        traceback.print_exc()
        return TandemError.exit_code


def entry_point() -> int:
    """Run the installed `tandem` command, and return its exit code."""
    streams = Streams()
    code = streams.settle(main(sys.argv[1:]), sys.argv[1:])
    # A debugger, a profiler and `python -i` wait for the interpreter to end.
    observed = sys.gettrace() or sys.getprofile() or sys.flags.inspect
    if "torch" in sys.modules and not observed:
        _end(code)
    return code


def _end(code: int) -> NoReturn:
    """End the process as Python does, but without taking modules apart.

    With torch and transformers loaded, that takes seconds. Everything registered for the end still
    runs: threads and child processes are joined, temporary folders removed, coverage written.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with suppress(OSError, ValueError):  # a reader has left, or the stream is closed
            if stream is not None:
                stream.flush()
    ctypes.CDLL(None).fflush(None)  # what C libraries have printed
    os._exit(code)


def _speaks() -> bool:
    """Return whether this process reports for its machine."""
    try:
        return launched().speaks
    except UserError:  # the error to report
        return True


def _settle() -> None:
    """Ignore a launcher's SIGTERM, sent to all when one ends, until all errors are reported."""
    if _in_contact():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _in_contact() -> bool:
    # torch may not even have been imported.
    return bool(getattr(sys.modules.get("torch.distributed"), "is_initialized", bool)())


def _dispatch(argv: list[str]) -> int:
    argv = without_local_rank(argv)
    if not argv:
        _top_parser().print_help()
        return 0
    name, rest = argv[0], argv[1:]
    if name in COMMANDS:
        if name not in _IN_SEVERAL and (count := launched().count) > 1:
            raise UserError(
                f"tandem {name} works in one process, and a launcher started {count}. Start it "
                f"without the launcher; {' and '.join(f'tandem {n}' for n in _IN_SEVERAL)} work in "
                "several."
            )
        for notice in forget_accelerates_settings():
            if launched().rank == 0:
                _complain(notice)
        module, function, _ = COMMANDS[name]
        handler: Callable[[list[str]], int] = getattr(import_module(module), function)
        return handler(rest)
    if name.startswith("-"):
        _top_parser().parse(argv)
    close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"Did you mean tandem {close[0]}? " if close else ""
    raise UserError(f"unknown command {name}. {hint}Commands: {', '.join(COMMANDS)}")


def _top_parser() -> Parser:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {about}" for name, (_, _, about) in COMMANDS.items())
    parser = Parser(
        prog="tandem",
        usage="tandem COMMAND ...",
        description="From a base language model to an aligned chat model: SFT, merge, DPO.",
        epilog=f"commands:\n{lines}\n\n"
        "tandem COMMAND --help says what a command takes. Start with: tandem run demo\n"
        "exit codes: 0 done, 1 a bug, 2 a mistake in what was asked, 3 stopped and resumable",
    )
    parser.add_argument("--version", action="version", version=f"tandem {__version__}")
    return parser


def _complain(message: str) -> None:
    sys.stdout.flush()
    print(message, file=sys.stderr)
