"""`--nproc N`: what starts, watches and ends the processes, with stand-ins for them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tandem.cli.main import main
from tandem.cli.nproc import _without_flag
from tandem.errors import UserError
from tandem.runtime.local_launcher import check_devices, run_processes

from ..warm.rendezvous import name_no_callers

name_no_callers()
SFT = ["sft", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]


@pytest.fixture(autouse=True)
def _by_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    # What the launcher sets for the processes it starts is gone after the test.
    for name in ("OMP_NUM_THREADS", "TANDEM_RESTART_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))


def _run(code: str, count: int = 2) -> tuple[int, list[str]]:
    """The exit code of processes that run some Python, and what was said about them."""
    said: list[str] = []
    return run_processes(count, [sys.executable, "-c", code], log=said.append), said


def test_mistakes_are_found_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (SFT, ["run", "demo"]):
        assert main([*argv, "--nproc", "0"]) == 2
        assert "argument --nproc: 0 is not above 0" in capsys.readouterr().err
    assert main(["run", "demo", "--nproc", "2", "sft.learnin_rate=1"]) == 2
    assert "unknown key sft.learnin_rate" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main([*SFT, "--nproc=3", "--device", "cuda"]) == 2
    assert "--nproc 3: this machine has 2 CUDA devices" in capsys.readouterr().err
    with pytest.raises(UserError, match="2 GPUs"):
        check_devices(3, "auto")
    check_devices(2, "auto")
    check_devices(3, "cpu")
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert main([*SFT, "--nproc", "2"]) == 2
    assert "a launcher has started this one (process 1 of 2)" in capsys.readouterr().err


def test_a_dry_run_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SFT, "--nproc", "4", "--dry_run"]) == 0
    assert "batch_size: 32" in capsys.readouterr().out  # 1 per device x 8 accumulation x 4
    assert _without_flag(["a", "--nproc", "2", "b", "--nproc=2", "--", "--nproc"]) == [
        *("a", "b", "--", "--nproc"),
    ]


def test_processes_know_each_other_and_all_must_succeed(tmp_path: Path) -> None:
    code, said = _run(
        "import os; from pathlib import Path; "
        f"Path({str(tmp_path)!r}, os.environ['RANK']).write_text(os.environ['WORLD_SIZE'])"
    )
    assert (code, said) == (0, [])
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]


def test_the_exit_code_is_theirs(capfd: pytest.CaptureFixture[str]) -> None:
    wait = "import os, sys, time; rank = int(os.environ['RANK']); "
    assert _run(f"{wait} time.sleep(60 * rank); sys.exit(2)") == (2, [])
    code, said = _run(f"{wait} time.sleep(60 * (1 - rank)); os.kill(os.getpid(), 9)")
    assert (code, said) == (1, ["error: process 1 was ended by SIGKILL"])
    assert capfd.readouterr().err == ""


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    code, said = _run(f"import os, sys; sys.exit(int(os.environ['OMP_NUM_THREADS']) - {cores})", 1)
    assert code == 0
    assert said == [f"1 process, each of {cores} thread{'' if cores == 1 else 's'}"]


def test_they_are_started_again_when_they_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start leaves a file; the third does not ask any more, and is the last in any case."""
    monkeypatch.setattr("tandem.runtime.local_launcher._RESTARTS", 2)
    ask = (
        "import os, sys; from pathlib import Path;"
        "from tandem.runtime.launch import ask_for_restart;"
        f"home = Path({str(tmp_path)!r}); starts = len(list(home.iterdir()));"
        "(home / str(starts)).touch();"
        "ask_for_restart(f'budget {8 - starts}') if starts < LIMIT else None;"
        "sys.exit(3 if starts < LIMIT else 0)"
    )
    code, said = _run(ask.replace("LIMIT", "2"), 1)
    assert code == 0
    assert said == [f"starting the processes again: budget {n}" for n in (8, 7)]
    for file in tmp_path.iterdir():
        file.unlink()
    code, said = _run(ask.replace("LIMIT", "99"), 1)
    assert code == 3
    assert len(said) == 3
    assert said[-1] == "started again 2 times and asked once more: budget 6"


@pytest.mark.parametrize(
    ("handler", "code", "said"),
    [
        # One that ends well, as a training stage does; one in a stage that knows nothing of it.
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))", 3, []),
        ("pass", 3, ["stopped by SIGTERM; the same command resumes the run"]),
        ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))", 0, []),
    ],
)
def test_a_signal_is_passed_on(handler: str, code: int, said: list[str], tmp_path: Path) -> None:
    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send).start()
    wait = "import os, signal, sys, time; from pathlib import Path;"
    there = f"Path({str(tmp_path)!r}, os.environ['RANK']).touch()"
    assert _run(f"{wait} {handler}; {there}; time.sleep(60)") == (code, said)
