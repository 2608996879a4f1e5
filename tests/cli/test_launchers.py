"""tandem as torchrun on two machines, deepspeed and accelerate launch start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tandem.cli.main import main
from tandem.storage.atomic_files import read_json, read_jsonl

from ..train.meeting import free_port
from ..warm.python import python

BIN = Path(sys.executable).parent
STAGE = {
    "batch_size": 3, "max_steps": 2, "save_steps": 1, "learning_rate": 1e-3, "logging_steps": 1,
    "max_length": 192, "max_prompt_length": 96, "lora": {"rank": 4, "alpha": 8},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _by_no_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)


def _start(command: Sequence[object], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _recipe(home: Path, some_data: Path, model: Path) -> Path:
    """A whole recipe over short real questions."""
    rows = []
    for line in (some_data / "pairs" / "orca_dpo_pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        if len(row["question"]) + len(row["chosen"]) < 600:
            answer = row["chosen"][:200]
            rows.append({"question": row["question"][-200:], "answer": answer})
    questions = home / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    conversations = home / "conversations.jsonl"
    lines = (some_data / "conversations" / "slimorca_format.jsonl").read_text().splitlines()
    conversations.write_text("\n".join(lines[:400:50]) + "\n")
    path = home / "recipe.yaml"
    recipe = {
        "name": "nodes", "model": str(model), "output_dir": str(home / "run"),
        "sft": {**STAGE, "data": str(conversations)},
        "pairs": {"prompts": str(questions), "max_new_tokens": 8, "keep": "different"},
        "dpo": STAGE,
        "evaluate": {"questions": str(questions), "max_new_tokens": 8},
    }  # fmt: skip
    path.write_text(json.dumps(recipe))
    return path


def test_a_whole_recipe_on_two_nodes(
    tmp_path: Path,
    some_data: Path,
    some_model: Path,
) -> None:
    """Two agents of one process each, here on one machine; it ends as in one process."""
    recipe, port = _recipe(tmp_path, some_data, some_model), free_port()

    place = ("--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port)
    torchrun = (python(), "-m", "torch.distributed.run", "--nnodes", 2, *place)
    started = [_start([*torchrun, "--node-rank", n, "-m", "tandem", "run", recipe]) for n in (0, 1)]
    said = [node.communicate(timeout=200)[0] for node in started]
    assert [node.returncode for node in started] == [0, 0], said
    assert said[0].count("report: ") == 1
    assert said[0].count("2 processes on cpu") == 2
    assert "report:" not in said[1]
    assert "sft:" not in said[1]
    run = tmp_path / "run"
    assert all(
        s["status"] == "finished" for s in read_json(run / "manifest.json")["stages"].values()
    )
    assert [line["step"] for line in read_jsonl(run / "4-dpo" / "metrics.jsonl")] == [1, 2]

    assert main(["run", str(recipe), f"output_dir={tmp_path / 'alone'}"]) == 0
    for model in ("2-sft-merged", "5-final"):
        ours = load_file(run / model / "model.safetensors")
        for name, other in load_file(tmp_path / "alone" / model / "model.safetensors").items():
            assert torch.dist(ours[name], other) <= 5e-5 * other.norm(), name


def test_another_recipe_on_another_node_is_refused(tmp_path: Path) -> None:
    """Before anything is read or written; without a launcher, which would end one for the other."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    output = f"output_dir={tmp_path / 'run'}"
    started = [
        _start(
            [python(), "-m", "tandem", "run", "demo", output, f"seed={rank}"],
            **{**place, "RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=100)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert "the recipe of process 1" in said[0]
    assert said[1] == ""
    assert not (tmp_path / "run").exists()


def _pairs(some_data: Path, home: Path) -> Path:
    lines = (some_data / "pairs" / "orca_dpo_pairs.jsonl").read_text().splitlines()
    path = home / "pairs.jsonl"
    path.write_text("\n".join(lines[:8]) + "\n")
    return path


def test_under_deepspeed_and_accelerate(tmp_path: Path, some_data: Path, some_model: Path) -> None:
    """`deepspeed --include` with its --local_rank argument, and accelerate's settings."""
    argv = ["--model_name_or_path", some_model, "--dataset_name", _pairs(some_data, tmp_path)]
    argv += ["--batch_size", 4, "--max_steps", 2, "--logging_steps", 1, "--max_length", 192]
    module = ("--module", "tandem", "dpo", *argv, "--output_dir")
    places = ("--include", "localhost:0,1", "--master_port", free_port())
    # On a CPU, deepspeed counts NUMA nodes unless it is told.
    deepspeed = _start(
        [python(), BIN / "deepspeed", *places, *module, tmp_path / "deepspeed"],
        DS_ACCELERATOR="cpu",
        LOCAL_SIZE="2",
    )
    said, _ = deepspeed.communicate(timeout=150)
    assert deepspeed.returncode == 0, said
    assert said.count("--local_rank=") == 2
    assert said.count("2 processes on cpu") == 1

    settings = ("--mixed_precision", "bf16", "--dynamo_backend", "no", "--main_process_port", 0)
    accelerate = _start(
        [python(), BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", 2,
         "--num_machines", 1, *settings, *module, tmp_path / "accelerate"]
    )  # fmt: skip
    said, _ = accelerate.communicate(timeout=150)
    assert accelerate.returncode == 0, said
    assert said.count("ACCELERATE_MIXED_PRECISION=bf16 has no effect") == 1
    assert said.count("2 processes on cpu (ddp), float32") == 1
    both = [
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("deepspeed", "accelerate")
    ]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
