"""A fork is the process that Python would have started."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tandem.cli.main import main

from ..stages.made_inputs import make_conversations, make_model_folder
from .python import python, server

ROOT = Path(__file__).resolve().parents[2]


def _ends(program: str, *arguments: str, **options: Any) -> tuple[int, str, str]:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import sys; print(sys.argv, __name__); sys.exit(3)",
        "print(input()); raise SystemExit('some words')",
        "import sys; sys.stderr.write('before'); 1 / 0",
        "import os, signal; print('lost'); os.kill(os.getpid(), signal.SIGKILL)",
        "raise KeyboardInterrupt",
        "import os; print(os.getcwd(), os.environ['SOME'], len(os.environ['PATH']))",
        "import atexit; atexit.register(print, 'at the end'); print('first')",
        "import sys; print(sys.stdin.isatty(), sys.stdout.line_buffering, sys.stderr.encoding)",
        "import threading, time; threading.Timer(0.1, print, ['later']).start()",
        "import signal; print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))",
    ],
)
def test_a_program_ends_as_under_python(code: str, tmp_path: Path) -> None:
    options = {"input": "a line\n", "cwd": tmp_path, "env": {**os.environ, "SOME": "é"}}
    ours, theirs = (
        _ends(program, "-c", code, "an argument", **options)
        for program in (python(), sys.executable)
    )
    assert ours[:2] == theirs[:2]
    # A newer Python underlines where in a line it was.
    assert ours[2].splitlines()[-1:] == theirs[2].splitlines()[-1:]


def test_training_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in this process, which Python has started."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = make_model_folder(tmp_path / "model")
    data = make_conversations(tmp_path / "data.jsonl")
    argv = ["sft", "--model_name_or_path", str(model), "--dataset_name", str(data)]
    argv += ["--max_steps", "3", "--batch_size", "4", "--max_length", "128", "--output_dir"]
    code, _, said = _ends(python(), "-m", "tandem", *argv, str(tmp_path / "fork"))
    assert code == 0, said
    assert main([*argv, str(tmp_path / "here")]) == 0
    adapters = [tmp_path / name / "adapter_model.safetensors" for name in ("fork", "here")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.parametrize(
    ("flags", "variables", "forked"),
    [
        ([], {}, True),
        (["-W", "error"], {}, False),
        ([], {"PYTHONHASHSEED": "1"}, False),
        ([], {"HF_HOME": "elsewhere"}, False),
        ([], {"PYTHONPATH": "elsewhere"}, False),
    ],
)
def test_what_counts_while_python_starts_is_left_to_python(
    flags: list[str], variables: dict[str, str], forked: bool
) -> None:
    code = "import sys; print('torch' in sys.modules)"
    env = {**os.environ, **variables}
    assert _ends(python(), *flags, "-c", code, env=env)[:2] == (0, f"{forked}\n")


def test_launchers_start_a_file_unbuffered(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text("import sys; print('torch' in sys.modules, sys.argv[1:], __name__)")
    found = _ends(python(), "-u", str(file), "--local_rank=0")
    assert found == (0, "True ['--local_rank=0'] __main__\n", "")


def test_libraries_that_set_variables_leave_it_a_fork() -> None:
    """lm_eval does when it is imported, as it is before most tests; so may any test before this."""
    importlib.import_module("lm_eval")
    code = "import sys; print('torch' in sys.modules)"
    assert _ends(python(), "-c", code, env={**os.environ}) == (0, "True\n", "")


_WORKER = """
import sys, tempfile
from tests.warm import python as warm
tempfile.tempdir = sys.argv[1]
# The server's own loop, without what it imports for other tests.
begin = "import sys; from tests.warm import server; server.import_everything = int"
warm.SERVER = ("-c", begin + "; server.main(*sys.argv[1:])")
print(warm.python(), warm.server().pid, flush=True)
sys.stdin.read()
"""


def test_workers_of_one_run_share_a_server_that_stays_for_the_last(tmp_path: Path) -> None:
    """Whichever finds none starts it; when the last has ended, its folder is gone."""
    command = [sys.executable, "-c", _WORKER, str(tmp_path)]
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    options |= {"env": {**os.environ, "PYTEST_XDIST_TESTRUNUID": "some-run"}, "cwd": ROOT}
    workers = [subprocess.Popen(command, **options) for _ in range(3)]
    told = set()
    for worker in workers:
        assert worker.stdout is not None
        with worker.stdout as said:
            told.add(said.readline())
    ((program, pid),) = map(str.split, told)
    for worker in workers:
        code = "import os; print(os.getppid())"
        assert _ends(program, "-c", code)[:2] == (0, f"{pid}\n")
        assert worker.stdin is not None
        worker.stdin.close()
    # The one that started it waits for it, and it for all that hold it.
    assert [worker.wait(timeout=30) for worker in workers] == [0, 0, 0]
    assert not psutil.pid_exists(int(pid))
    assert list(tmp_path.iterdir()) == []


def test_a_signal_to_all_children_of_the_tests_does_not_end_the_server() -> None:
    for signal_ in (signal.SIGTERM, signal.SIGINT):
        server().send_signal(signal_)
    code = (
        "import signal, sys; print('torch' in sys.modules, signal.getsignal(signal.SIGTERM).name)"
    )
    assert _ends(python(), "-c", code) == (0, "True SIG_DFL\n", "")


def test_signals_reach_the_program_and_its_client_takes_it_along() -> None:
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    for number, ended in ((signal.SIGTERM, 4), (signal.SIGKILL, -signal.SIGKILL)):
        with subprocess.Popen([python(), "-c", code], stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            fork = psutil.Process(int(client.stdout.readline()))
            client.send_signal(number)
            assert client.wait(timeout=30) == ended
            psutil.wait_procs([fork], timeout=30)
            assert not fork.is_running()
