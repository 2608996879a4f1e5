"""Where the tests get a Python that need not import torch, transformers and tandem anew.

`python()` is the path of a program that takes Python's arguments and runs in a fork of a server.
All workers of a test run share the server, whose imports take long: the first that asks starts it.
See `client.py` for what sends the program to the true Python.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from .client import read_at_import

SERVER: tuple[str, ...] = ("-m", "tests.warm.server")
_PYTHON = sys.executable
_ROOT = Path(__file__).resolve().parents[2]
# As it was before any test: what a test changes in it goes along with each program.
_ENVIRONMENT = {
    **os.environ,
    **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
}


@functools.cache
def python() -> str:
    """The path of a program that is used as `sys.executable`, with the server behind it."""
    folder = _folder()
    with locked(folder):
        held = _hold(folder)
        if held is None:
            _start(folder)
        else:
            atexit.register(os.close, held)
    return str(folder / "python")


def server() -> psutil.Process:
    """The process that `python()` forks."""
    return psutil.Process(int((Path(python()).parent / "pid").read_text()))


@functools.cache
def _folder() -> Path:
    """A folder of this process, or of all workers of a test run."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return Path(tempfile.mkdtemp(prefix="tandem-warm-"))
    return Path(tempfile.gettempdir()) / f"tandem-warm-{run[:12]}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let nobody else look at the server's folder, which is made where it is missing."""
    ours = False
    while not ours:
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as open_files:
            lock = open_files.enter_context((folder / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            # A server that ended meanwhile has removed the folder with its lock.
            ours = os.path.samestat(os.fstat(lock.fileno()), (folder / "lock").stat())
            kept = open_files.pop_all() if ours else ExitStack()
    with kept:
        yield


def _hold(folder: Path) -> int | None:
    """Have a server stay until what is returned is closed; None if there is no server."""
    try:
        return os.open(folder / "held", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # nobody has made it, or nobody reads it any more
        return None


def _start(folder: Path) -> None:
    """Start the server: it ends when no process holds its input open any longer."""
    address, program = folder / "socket", folder / "python"
    given = _ENVIRONMENT.get("PYTHONPATH", "")
    paths = [str(_ROOT), str(_ROOT / "src"), *filter(None, given.split(os.pathsep))]
    known = {
        "address": str(address),
        "python": _PYTHON,
        "environment": read_at_import(_ENVIRONMENT),
        "paths": paths,
    }
    source = (Path(__file__).parent / "client.py").read_text()
    # Isolated, and without site-packages: this one is to start as fast as it can.
    start = f"#!{_PYTHON} -IS\n{source}\nmain(json.loads({json.dumps(known)!r}))\n"
    program.write_text(start)
    program.chmod(0o700)
    # IPython looks for commands beside its Python.
    command = folder / "tandem"
    command.write_text(f'#!/bin/sh\nexec {program} -m tandem "$@"\n')
    command.chmod(0o700)
    for left in (address, folder / "held"):
        left.unlink(missing_ok=True)
    os.mkfifo(folder / "held")
    ending = os.open(folder / "held", os.O_RDONLY | os.O_NONBLOCK)
    held = _hold(folder)
    assert held is not None
    server = subprocess.Popen(
        [_PYTHON, *SERVER, str(address), str(program)],
        stdin=ending,
        stdout=subprocess.PIPE,
        cwd=_ROOT,
        env={**_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)},
    )
    os.close(ending)
    (folder / "pid").write_text(str(server.pid))
    assert server.stdout is not None
    with server.stdout as said:
        assert said.readline() == b"ready\n"

    def close() -> None:
        os.close(held)
        server.wait()  # for the other workers, too

    atexit.register(close)
