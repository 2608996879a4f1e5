"""Commands in processes of their own that can be killed at any moment, without importing anew.

A server imports everything once and forks for each command. The fork counts what it does to files
(an audit hook sees every open for writing, rename, mkdir and removal) and kills itself with SIGKILL
just before the n-th of them: any moment of any stage can be hit, and the same one again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = """
import importlib, json, os, signal, sys
for name in ("cli.main", "recipe.load", "stages.pipeline", "stages.sft", "stages.dpo",
             "stages.merge", "stages.pairs", "stages.evaluate", "report.html", "chat.session"):
    importlib.import_module("tandem." + name)
from tandem.cli.main import main

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")

def change(event, arguments, root):
    if event == "open":
        wanted = isinstance(arguments[0], str) and bool((arguments[2] or 0) & WRITING)
    else:
        wanted = event in CHANGES
    return wanted and os.path.abspath(arguments[0]).startswith(root)

def command(order):
    os.environ.update(order["environment"])
    seen = 0
    def watch(event, arguments):
        nonlocal seen
        if change(event, arguments, order["root"]):
            seen += 1
            if seen == order["kill_at"]:
                os.kill(os.getpid(), signal.SIGKILL)
    with open(order["output"], "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.addaudithook(watch)
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
    _, status = os.waitpid(pid, 0)
    print(json.dumps(status), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, or `killed`; `said` is stdout and stderr."""

    code: int
    killed: bool
    said: str


class Launcher:
    """Runs commands one after the other; a context manager.

    Args:
        home: the current folder of the commands, and where their output is kept.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Launcher:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.home,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.communicate()

    def run(self, *argv: str, root: Path, cache: str, kill_at: int = 0) -> Done:
        """Run one command line.

        Args:
            argv: the command's arguments.
            root: the folder below which changes are counted.
            cache: name of the cache folder that it uses.
            kill_at: it is killed before this change, counted from 1; 0 lets it be.
        """
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        output = self.home / "output.txt"
        order: dict[str, Any] = {
            "argv": argv,
            "root": str(root),
            "kill_at": kill_at,
            "output": str(output),
            "environment": {"XDG_CACHE_HOME": str(self.home / cache)},
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1
        return Done(code, killed, output.read_text())
