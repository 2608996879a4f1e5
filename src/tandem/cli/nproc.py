"""`--nproc N`: the same command in N processes on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tandem.cli.parser import positive
from tandem.errors import UserError
from tandem.runtime.launch import launched, started_by_launcher

_FLAG = "--nproc"


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Declare `--nproc`."""
    about = "Start N processes on this machine, one for each device, which share the work."
    parser.add_argument(_FLAG, type=positive, metavar="N", help=about)


def in_processes(count: int, name: str, argv: Sequence[str], *, device: str) -> int:
    """Run a command in `count` processes, and return its exit code.

    `argv` are its arguments, with `--nproc`. Raises UserError in a process that a launcher has
    started, and for more processes than devices.
    """
    if started_by_launcher():
        here = launched()
        raise UserError(
            f"{_FLAG} starts processes itself, but a launcher has started this one (process "
            f"{here.rank} of {here.count}); leave one of the two out"
        )
    from tandem.runtime.local_launcher import check_devices, run_processes

    check_devices(count, device)
    command = [sys.executable, "-m", "tandem", name, *_without_flag(argv)]
    return run_processes(count, command, log=lambda text: print(text, file=sys.stderr, flush=True))


def _without_flag(argv: Sequence[str]) -> list[str]:
    """Drop the flag and its value from the arguments."""
    kept: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--":
            return [*kept, argument, *arguments]
        if argument == _FLAG:
            next(arguments)
        elif not argument.startswith(f"{_FLAG}="):
            kept.append(argument)
    return kept
