"""Commands that a launcher starts in several processes."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch

from tandem.cli.main import COMMANDS, main
from tandem.errors import UserError
from tandem.runtime.launch import (
    Launch,
    ask_for_restart,
    forget_accelerates_settings,
    launched,
    without_local_rank,
)
from tandem.storage.atomic_files import read_json, read_jsonl

from ..invariants.orders import torchrun
from ..stages.made_inputs import make_conversations, make_model_folder
from ..warm.python import python

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def _pretend(monkeypatch: pytest.MonkeyPatch, *values: object) -> None:
    for name, value in zip(_ENVIRONMENT, values, strict=True):
        monkeypatch.setenv(name, str(value))


def test_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert launched() == Launch(0, 1, 0, 1)
    _pretend(monkeypatch, 3, 4, 1, 2)
    assert launched() == Launch(rank=3, count=4, local_rank=1, local_count=2)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(UserError, match="RANK is 4 and WORLD_SIZE 4"):
        launched()
    monkeypatch.setenv("LOCAL_RANK", "-1")
    with pytest.raises(UserError, match="LOCAL_RANK is '-1'"):
        launched()
    _pretend(monkeypatch, 3, 4, 1, 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_SIZE", "2")  # as deepspeed calls it
    assert launched() == Launch(rank=3, count=4, local_rank=1, local_count=2)


def test_deepspeeds_argument_before_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pretend(monkeypatch, 1, 2, 1, 2)
    argv = ["sft", "--help"]
    assert without_local_rank(["--local_rank=1", *argv]) == argv
    assert without_local_rank(["--local-rank=1", *argv]) == argv
    assert without_local_rank([*argv, "--local_rank=1"]) == argv
    assert without_local_rank(argv) == argv
    assert main(["--local_rank=0", *argv]) == 2
    monkeypatch.delenv("LOCAL_RANK")
    _pretend(monkeypatch, 0, 2, 0, 2)
    assert main(["--local_rank=1", *argv]) == 2
    assert "--local_rank=1 is for launchers, and LOCAL_RANK is 0" in capsys.readouterr().err


def test_what_accelerate_launch_hands_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    assert forget_accelerates_settings() == []
    _pretend(monkeypatch, 0, 2, 0, 2)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    said = forget_accelerates_settings()
    assert "ACCELERATE_MIXED_PRECISION=bf16 has no effect: the recipe's dtype says it" in said[0]
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8 has no effect" in said[1]
    assert len(said) == 2
    assert not [name for name in os.environ if name.startswith("ACCELERATE_")]

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="engine: deepspeed-zero2"):
        forget_accelerates_settings()
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="asked for several processes and started one"):
        forget_accelerates_settings()


def test_word_to_be_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_RESTART_FILE", raising=False)
    assert not ask_for_restart("a smaller budget")
    monkeypatch.setenv("TANDEM_RESTART_FILE", str(tmp_path / "word"))
    assert ask_for_restart("a smaller budget")
    assert (tmp_path / "word").read_text() == "a smaller budget"


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"run", "sft", "dpo", "sweep"}))
def test_what_does_not_train_is_refused_once(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _pretend(monkeypatch, 0, 2, 0, 2)
    assert main([name, "demo"]) == 2
    error = capsys.readouterr().err
    assert f"tandem {name} works in one process, and a launcher started 2" in error
    assert "tandem run and tandem sft and tandem dpo and tandem sweep work in several" in error
    _pretend(monkeypatch, 1, 2, 1, 2)
    assert main([name, "demo"]) == 2
    assert capsys.readouterr().err == ""


def test_more_processes_than_devices_are_refused_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    argv = ["sft", "--model_name_or_path", "m", "--dataset_name", "d", "--device", "cuda"]
    argv += ["--output_dir", str(tmp_path / "out")]
    for rank, count in ((0, 1), (1, 0)):
        _pretend(monkeypatch, rank, 2, rank, 2)
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert said.count("2 processes were started on a machine with 1 CUDA device") == count
    assert main(["run", "demo", "device=cuda", f"output_dir={tmp_path / 'run'}"]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sft", "--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", "o"]
    _pretend(monkeypatch, 1, 2, 1, 2)
    assert main([*argv, "--dry_run"]) == 0
    assert capsys.readouterr() == ("", "")
    _pretend(monkeypatch, 0, 2, 0, 2)
    assert main([*argv, "--dry_run"]) == 0
    assert "batch_size: 16" in capsys.readouterr().out


@contextmanager
def _launch(command: Sequence[str], home: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(home / "cache")},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        for child in _ranks(home).values() if process.poll() is None else ():
            child.kill()
        process.kill()
        process.wait()


def _ranks(home: Path) -> dict[str, psutil.Process]:
    """The training processes by rank, found by the cache that they were told to use."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            environment = process.environ()
            if environment.get("XDG_CACHE_HOME") == str(home / "cache") and "RANK" in environment:
                found[environment["RANK"]] = process
    return found


def _await_ranks(home: Path, process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """Both training processes, looked for before there is something to wait for."""
    while process.poll() is None:
        if len(found := _ranks(home)) == 2:
            return found
        time.sleep(0.1)
    raise AssertionError("the processes were not started")


def _await_checkpoint(folder: Path, beyond: int, process: subprocess.Popen[str]) -> int:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        steps = [int(p.name[-6:]) for p in folder.glob("checkpoints/step-*")]
        if steps and max(steps) > beyond:
            return max(steps)
        time.sleep(0.01)
    raise AssertionError("no checkpoint was written")


def test_a_lost_process_and_a_stop_end_all_and_one_process_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model_folder(tmp_path / "model")
    make_conversations(tmp_path / "data.jsonl")
    out = tmp_path / "out"
    argv = ["sft", "--model_name_or_path", f"{tmp_path}/model", "--output_dir", f"{out}"]
    argv += ["--dataset_name", f"{tmp_path}/data.jsonl", "--batch_size", "2", "--max_steps", "90"]
    argv += ["--max_length", "128", "--save_steps", "5", "--logging_steps", "1"]

    tandem = ("-m", "tandem")
    with _launch([*torchrun(2), *tandem, *argv], tmp_path) as process:
        ranks = _await_ranks(tmp_path, process)
        step = _await_checkpoint(out, 0, process)
        ranks["1"].kill()
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count("process 0 of 2 lost contact with another one") == 1
    assert said.count("sft: 24 of 24 records to train on") == 1
    assert not (out / ".lock").exists()

    with _launch([python(), *tandem, *argv, "--nproc", "2"], tmp_path) as process:
        _await_checkpoint(out, step + 5, process)
        process.terminate()
        _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert said.count("stopped") == 2, said  # "stopped: stopped after step"
    assert "Traceback" not in said
    assert "another schedule" not in said
    steps = [line["step"] for line in read_jsonl(out / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert (out / "checkpoints" / f"step-{steps[-1]:06d}").is_dir()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in _ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert "processes 2 -> 1" in said
    assert f"(step {steps[-1]} of 90)" in said
    assert read_json(out / "summary.json")["processes"] == 1
    assert [line["step"] for line in read_jsonl(out / "metrics.jsonl")] == list(range(1, 91))
