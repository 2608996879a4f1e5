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
from .test_launchers import BIN

# In the second process the 6th call of the model fails, as long as nothing is remembered.
_FAILS = """
import importlib.abc, importlib.util, itertools, os, sys

class Patch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "tandem.model.logprobs.sequence_logps":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        plain = spec.loader.exec_module

        def run(module):
            plain(module)
            forward, count = module.Scorer.forward, itertools.count(1)

            def failing(self, batch):
                if next(count) == 6:
                    raise RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB.")
                return forward(self, batch)

            module.Scorer.forward = failing

        spec.loader.exec_module = run
        return spec

if os.environ.get("RANK") == "1" and not os.path.exists(os.environ["MEMORY"]):
    sys.meta_path.insert(0, Patch())
"""


def test_all_processes_begin_again_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model_folder(tmp_path / "model")
    make_conversations(tmp_path / "data.jsonl")
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "sitecustomize.py").write_text(_FAILS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    argv = ["sft", "--model_name_or_path", f"{tmp_path}/model"]
    argv += ["--dataset_name", f"{tmp_path}/data.jsonl", "--batch_size", "12", "--max_steps", "8"]
    argv += ["--max_length", "128", "--save_steps", "2", "--logging_steps", "1"]
    assert main([*argv, "--output_dir", f"{tmp_path}/alone"]) == 0

    out = tmp_path / "out"
    paths = [str(tmp_path / "patch"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [BIN / "tandem", *argv, "--output_dir", out, "--nproc", "2", "--engine", "fsdp2"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "MEMORY": str(out / "memory.json"),
        },
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
    assert "going on from" in done.stderr
    assert [line["step"] for line in read_jsonl(out / "metrics.jsonl")] == list(range(1, 9))
    found, like = (load_file(f / "adapter_model.safetensors") for f in (out, tmp_path / "alone"))
    assert distance(found, like) < LIMITS["float32"][1]
