"""`tandem pairs` in processes that can be killed at any time, without importing anew.

A server imports everything once and forks for each command. What a fork's model has generated, and
what of it was asked for, is noted in a file beside, so that repetitions show.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SERVER = """
import json, os, sys
from tandem.cli.main import main
from tandem.stages import writers
# Once here, so that what is imported on the way need not be imported by each fork.
assert main(json.loads(sys.argv[1])) == 0

def command(order):
    with open(order["output"], "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    real = writers.generate_batch
    def noted(model, prompts, numbers, **options):
        with open(order["log"], "a") as log:
            log.write(json.dumps(list(numbers)) + "\\n")
        return real(model, prompts, numbers, **options)
    writers.generate_batch = noted
    code = main(order["argv"])
    sys.stdout.flush()
    os._exit(code)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        try:
            command(json.loads(line))
        finally:
            os._exit(70)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, or `killed`; what it said, and what it generated."""

    code: int
    killed: bool
    said: str
    generated: list[int]


class Forks:
    """Runs `tandem` command lines one after the other; a context manager.

    Args:
        home: the current folder of the commands.
        first: a command line that is run once, before the others.
    """

    def __init__(self, home: Path, *first: str) -> None:
        self._home = home
        self._first = json.dumps(first)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Forks:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, self._first],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self._home,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        assert "first" in self._process.stdout.readline()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.communicate()

    def run(self, *argv: str, kill: Callable[[], bool] | None = None, after: float = 0.0) -> Done:
        """Run one command line.

        Args:
            argv: the command's arguments.
            kill: it is killed `after` seconds when this is so; None lets it be.
            after: seconds.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        output, log = self._home / "output.txt", self._home / "log.txt"
        log.unlink(missing_ok=True)
        order = {"argv": argv, "output": str(output), "log": str(log)}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        if kill is not None:
            while not kill() and _lives(pid):
                time.sleep(0.001)
            time.sleep(after)
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(pid, signal.SIGKILL)
        status = int(process.stdout.readline())
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1
        lines = log.read_text().splitlines() if log.exists() else []
        generated = [number for line in lines for number in json.loads(line)]
        return Done(code, killed, output.read_text(), generated)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
