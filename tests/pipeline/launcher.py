"""Commands in processes of their own that can be killed at any moment, without importing anew.

Each runs in a fork of the warm Python. It counts what it does to files (an audit hook sees every
open for writing, rename, mkdir and removal) and kills itself with SIGKILL just before the n-th of
them: any moment of any stage can be hit, and the same one again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..warm.python import python

PROGRAM = """
import json, os, signal, sys
from tandem.cli.main import main

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree")
order = json.loads(sys.argv[1])
seen = 0

def change(event, arguments):
    if event == "open":
        wanted = isinstance(arguments[0], str) and bool((arguments[2] or 0) & WRITING)
    else:
        wanted = event in CHANGES
    return wanted and os.path.abspath(arguments[0]).startswith(order["root"])

def watch(event, arguments):
    global seen
    if change(event, arguments):
        seen += 1
        if seen == order["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
raise SystemExit(main(order["argv"]))
"""


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code, or `killed`; `said` is stdout and stderr."""

    code: int
    killed: bool
    said: str


@dataclass(frozen=True)
class Launcher:
    """Runs commands one after the other.

    Args:
        home: the current folder of the commands.
    """

    home: Path

    def run(self, *argv: str, root: Path, cache: str, kill_at: int = 0) -> Done:
        """Run one command line.

        Args:
            argv: the command's arguments.
            root: the folder below which changes are counted.
            cache: name of the cache folder that it uses.
            kill_at: it is killed before this change, counted from 1; 0 lets it be.
        """
        order: dict[str, Any] = {"argv": argv, "root": str(root), "kill_at": kill_at}
        done = subprocess.run(
            [python(), "-c", PROGRAM, json.dumps(order)],
            cwd=self.home,
            env={**os.environ, "XDG_CACHE_HOME": str(self.home / cache), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Done(done.returncode, done.returncode == -signal.SIGKILL, done.stdout)
