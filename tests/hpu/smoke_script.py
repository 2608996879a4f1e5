"""scripts/hpu_smoke.sh with a Python that only notes the commands it is to run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "hpu_smoke.sh"
# It makes the script's data; a module is noted, word by word, and fails if it names a word of FAIL.
_PYTHON = """#!/bin/bash
[ "$1" = -m ] || exec {python} "$@"
printf '%s\\n' "$@" "" >>{notes}
[[ -z $FAIL || " $* " != *" $FAIL "* ]]
"""


def run_script(
    home: Path, folder: str, *flags: str, code: int = 0, **variables: str
) -> list[list[str]]:
    """Run the script into HOME/FOLDER; returns the arguments of each `tandem` that it starts.

    Args:
        code: how the script is to end.
    """
    python, notes = home / "noting-python", home / "noted.txt"
    python.write_text(_PYTHON.format(python=sys.executable, notes=notes))
    python.chmod(0o755)
    notes.unlink(missing_ok=True)
    ran = subprocess.run(
        ["bash", str(SCRIPT), str(home / folder), *flags],
        env={**os.environ, "PYTHON": str(python), **variables},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert ran.returncode == code, ran.stdout + ran.stderr
    (home / f"{folder}.txt").write_text(ran.stdout)
    calls = [call.splitlines() for call in notes.read_text().split("\n\n") if call]
    commands = [call[2:] for call in calls if call[:2] == ["-m", "tandem"]]
    return [argv for argv in commands if argv != ["--version"]]
