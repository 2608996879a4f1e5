"""Where the tests get a Python that need not import torch, transformers and tandem anew.

`python()` is the path of a program that takes Python's arguments and runs in a fork of a server,
which this process starts when it first asks. See `client.py` for what sends it to the true Python.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .client import read_at_import

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
    folder = Path(tempfile.mkdtemp(prefix="tandem-warm-"))
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
    server = subprocess.Popen(
        [_PYTHON, "-m", "tests.warm.server", str(address), str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=_ROOT,
        env={**_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"

    def close() -> None:
        server.communicate()  # the end of its input is the end of the server
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(close)
    return str(program)
