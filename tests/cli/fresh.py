"""Commands in a new Python process, and which packages they imported there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PROGRAM = """
import json, sys
from tandem.cli.main import main
code = main(sys.argv[1:])
names = {name.partition(".")[0] for name in sys.modules}
print(json.dumps(sorted(names - sys.stdlib_module_names)))
sys.exit(code)
"""


_PROGRAMS = """
import contextlib, io, json, sys
from tandem.cli.main import main
told = []
for argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    told.append([code, out.getvalue(), err.getvalue()])
names = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([told, sorted(names - sys.stdlib_module_names)]))
"""


@dataclass(frozen=True)
class Fresh:
    """How a command ended, what it said, and the packages that are no part of Python."""

    code: int
    out: str
    err: str
    packages: frozenset[str]


def fresh(*argv: object, home: Path) -> Fresh:
    """Run one command line in the folder `home`."""
    done = _ran(_PROGRAM, [*map(str, argv)], home)
    *out, packages = done.stdout.splitlines()
    return Fresh(done.returncode, "\n".join(out), done.stderr, frozenset(json.loads(packages)))


def fresh_one_by_one(commands: Sequence[Sequence[str]], *, home: Path) -> list[Fresh]:
    """Run command lines in one process after each other; the packages are those of all of them."""
    told, packages = json.loads(_ran(_PROGRAMS, [json.dumps(commands)], home).stdout)
    return [Fresh(*one, frozenset(packages)) for one in told]


def _ran(program: str, arguments: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=home,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(home / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done
