"""Memory that runs out where weights are spread: `--nproc` starts all processes again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tandem.cli.main import main
from tandem.storage.atomic_files import read_json, read_jsonl

from ..invariants.orders import LIMITS, distance
from ..stages.made_inputs import make_conversations, make_model_folder
from ..warm.python import python

# `tandem` where the 4th call of the model fails in the second process, as long as nothing is
# remembered. As a Python, so that the launcher starts the other processes with it.
_FAILS = """
import itertools, os, sys
from tandem.cli.main import entry_point
from tandem.model.logprobs.sequence_logps import Scorer

forward, count = Scorer.forward, itertools.count(1)

def failing(self, batch):
    if next(count) == 4:
        raise RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB.")
    return forward(self, batch)

if os.environ.get("RANK") == "1" and not os.path.exists(os.environ["MEMORY"]):
    Scorer.forward = failing
sys.executable = os.environ["FAILING"]
module = sys.argv.index("tandem")
sys.argv = sys.argv[module:]
raise SystemExit(entry_point())
"""


def test_all_processes_begin_again_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model_folder(tmp_path / "model")
    make_conversations(tmp_path / "data.jsonl")
    (tmp_path / "fails.py").write_text(_FAILS)
    failing = tmp_path / "python"
    failing.write_text(f'#!/bin/sh\nexec {python()} {tmp_path}/fails.py "$@"\n')
    failing.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    argv = ["sft", "--model_name_or_path", f"{tmp_path}/model"]
    argv += ["--dataset_name", f"{tmp_path}/data.jsonl", "--batch_size", "12", "--max_steps", "5"]
    argv += ["--max_length", "128", "--save_steps", "2", "--logging_steps", "1"]
    assert main([*argv, "--output_dir", f"{tmp_path}/alone"]) == 0

    out = tmp_path / "out"
    done = subprocess.run(
        [failing, "-m", "tandem", *argv, "--output_dir", out, "--nproc", "2", "--engine", "fsdp2"],
        env={**os.environ, "MEMORY": str(out / "memory.json"), "FAILING": str(failing)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    less = read_json(out / "memory.json")["tokens_per_microbatch"]
    assert done.stderr.count("starting the processes again: out of memory with") == 1
    assert (
        done.stderr.count(f"attention segments (the fastest that computes this model), {less} ")
        == 1
    )
    assert "resuming from" in done.stderr
    assert [line["step"] for line in read_jsonl(out / "metrics.jsonl")] == list(range(1, 6))
    found, like = (load_file(f / "adapter_model.safetensors") for f in (out, tmp_path / "alone"))
    assert distance(found, like) < LIMITS["float32"][1]
