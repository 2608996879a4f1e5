"""With torch loaded, a command ends at once; what was registered for the end still happens."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROGRAM = """
    import atexit, ctypes, sys, tempfile, threading, time, types
    from tandem.cli import main as entry

    sys.modules["torch"] = types.ModuleType("torch")

    class Torn:
        def __del__(self):
            print("modules are taken apart")

    torn = Torn()
    kept = tempfile.TemporaryDirectory(dir=sys.argv[1])
    atexit.register(print, "registered for the end")
    waited_for = threading.Thread(target=lambda: (time.sleep(0.2), print("a thread's last word")))
    waited_for.start()
    entry.main = lambda argv: ctypes.CDLL(None).printf(b"from C, ") and 3
    sys.exit(entry.entry_point())
"""


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def _run(scratch: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(before) + textwrap.dedent(PROGRAM)
    return subprocess.run(
        [sys.executable, "-c", program, str(scratch)], capture_output=True, text=True, check=False
    )


def test_threads_exit_functions_and_buffers_end_as_they_should(scratch: Path) -> None:
    done = _run(scratch)
    assert (done.returncode, done.stderr) == (3, "")
    assert "from C, " in done.stdout
    said = done.stdout.replace("from C, ", "")
    assert said == "a thread's last word\nregistered for the end\n"
    assert not list(scratch.iterdir())


def test_a_profiler_sees_the_interpreters_own_end(scratch: Path) -> None:
    done = _run(scratch, "import sys; sys.setprofile(lambda *_: None)")
    assert done.returncode == 3
    assert "registered for the end" in done.stdout


def test_a_command_without_torch_ends_as_python_does() -> None:
    program = (
        "import sys\n"
        "from tandem.cli import main as entry\n"
        "entry._end = lambda code: print('cut short')\n"
        "sys.argv = ['tandem', '--version']\n"
        "code = entry.entry_point()\n"
        "print('torch' in sys.modules)\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.splitlines()[1:] == ["False"]
