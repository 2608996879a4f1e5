"""`tandem pairs` in processes that can be killed at any time, without importing anew.

Each runs in a fork of the warm Python. What its model has generated, and what of it was asked for,
is noted in a file beside, so that repetitions show.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..warm.python import python

PROGRAM = """
import json, os, sys
from tandem.cli.main import main
from tandem.model import generate

order = json.loads(sys.argv[1])
real = generate.generate_batch

def noted(model, prompts, numbers, **options):
    with open(order["log"], "a") as log:
        log.write(json.dumps(list(numbers)) + "\\n")
    return real(model, prompts, numbers, **options)

generate.generate_batch = noted
with open(order["pid"], "w") as file:
    file.write(str(os.getpid()))
os.rename(order["pid"], order["pid"] + ".txt")
raise SystemExit(main(order["argv"]))
"""


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, or `killed`; what it said, and what it generated."""

    code: int
    killed: bool
    said: str
    generated: list[int]


@dataclass(frozen=True)
class Forks:
    """Runs `tandem` command lines one after the other.

    Args:
        home: the current folder of the commands.
    """

    home: Path

    def run(self, *argv: str, kill: Callable[[], bool] | None = None, after: float = 0.0) -> Done:
        """Run one command line.

        Args:
            argv: the command's arguments.
            kill: it is killed `after` seconds when this is so; None lets it be.
            after: seconds.
        """
        output, log, pid = self.home / "output.txt", self.home / "log.txt", self.home / "pid.txt"
        for file in (log, pid):
            file.unlink(missing_ok=True)
        order = {"argv": argv, "log": str(log), "pid": str(pid.with_suffix(""))}
        with (
            output.open("w") as said,
            subprocess.Popen(
                [python(), "-c", PROGRAM, json.dumps(order)],
                cwd=self.home,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=said,
                stderr=said,
            ) as process,
        ):
            if kill is not None:
                while not (pid.exists() and kill()) and process.poll() is None:
                    time.sleep(0.001)
                time.sleep(after)
                with suppress(ProcessLookupError, FileNotFoundError):  # it has ended by itself
                    os.kill(int(pid.read_text()), signal.SIGKILL)
            code = process.wait()
        lines = log.read_text().splitlines() if log.exists() else []
        generated = [number for line in lines for number in json.loads(line)]
        return Done(code, code == -signal.SIGKILL, output.read_text(), generated)
