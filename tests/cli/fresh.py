"""A command in a new Python process, and which packages it imported there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


@dataclass(frozen=True)
class Fresh:
    """How a command ended, what it said, and the packages that are no part of Python."""

    code: int
    out: str
    err: str
    packages: frozenset[str]


def fresh(*argv: object, home: Path) -> Fresh:
    """Run one command line in the folder `home`."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *map(str, argv)],
        cwd=home,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(home / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    *out, packages = done.stdout.splitlines()
    return Fresh(done.returncode, "\n".join(out), done.stderr, frozenset(json.loads(packages)))
