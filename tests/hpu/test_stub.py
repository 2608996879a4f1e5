"""SFT and DPO on an HPU that a stub bridge pretends: boundaries, shapes, syncs, results.

Tensors stay on the CPU, so nothing here says that a Gaudi computes the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tandem.storage.atomic_files import read_jsonl

from ..stages.made_inputs import make_model_folder
from .driver import LENGTHS, SETTINGS, run_stages

ROOT = Path(__file__).resolve().parents[2]
STUB = Path(__file__).parent / "stub"
MODES = ("eager", "lazy")


@dataclass(frozen=True)
class Done:
    """Both modes' runs: what was watched, and the folders."""

    home: Path
    watched: dict[str, Any]

    def summary(self, mode: str, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / mode / stage / "summary.json").read_text())
        return found


def environment(home: Path, **extra: str) -> dict[str, str]:
    """A process's environment with the stub in it, and no launcher."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PT_", "WORLD_SIZE"))}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), str(STUB)]),
        "XDG_CACHE_HOME": str(home / "cache"),
        "TANDEM_KERNELS": "off",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "error",
        **extra,
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    home = tmp_path_factory.mktemp("hpu")
    make_model_folder(home / "model")
    watched = {}
    for mode in MODES:
        ran = subprocess.run(
            [sys.executable, "-m", "tests.hpu.driver", str(home), mode],
            cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        watched[mode] = json.loads(ran.stdout.splitlines()[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache-cpu"))
        run_stages(home / "cpu", home / "model")
    return Done(home, watched)


@pytest.mark.parametrize("mode", MODES)
def test_the_bridge_is_found_and_told_its_mode_before_torch(done: Done, mode: str) -> None:
    seen = done.watched[mode]
    assert seen["early"], "the mode is set before torch is imported"
    flag = "1" if mode == "lazy" else "0"
    assert seen["modes"] == {"PT_HPU_LAZY_MODE": flag, "PT_ENABLE_INT64_SUPPORT": "1"}
    assert (seen["kind"], seen["weights"]) == ("hpu", "torch.bfloat16")
    assert seen["lazy"] is (mode == "lazy")
    # transformers patches torch when the device is chosen, not in the middle of a run.
    assert seen["found"] == [True, True, "hpu_backend_compile"]


def test_lazy_mode_marks_each_backward_and_each_step(done: Done) -> None:
    assert done.watched["eager"]["marks"] == 0
    summaries = [done.summary("lazy", stage) for stage in ("sft", "dpo")]
    assert done.watched["lazy"]["marks"] == sum(s["micro_batches"] + s["steps"] for s in summaries)
    assert all(s["steps"] == SETTINGS["max_steps"] for s in summaries)
    assert done.summary("eager", "sft")["micro_batches"] > done.summary("eager", "sft")["steps"]


@pytest.mark.parametrize("mode", MODES)
def test_only_declared_shapes_reach_the_model(done: Done, mode: str) -> None:
    seen = done.watched[mode]
    lengths = set(LENGTHS) if mode == "eager" else {128}
    assert {rows for rows, _, _ in seen["inputs"]} == lengths
    # SFT's records and DPO's differ in density, so each stage declares its own.
    assert len(seen["inputs"]) <= 2 * len(lengths)
    # Every operator and every result's shape is the same for every micro-batch of a shape, in
    # SFT, in DPO and in its reference pass. But dropout makes its constants in the first forward,
    # and a step's first backward sets gradients where the others add to them.
    for name, count in seen["streams"].items():
        assert count <= {"forward": 3, "backward": 4, "reference": 1}[name.split()[0]], name
    assert {name.split()[0] for name in seen["streams"]} == {"forward", "backward", "reference"}


@pytest.mark.parametrize("mode", MODES)
def test_no_host_sync_in_forward_or_backward(done: Done, mode: str) -> None:
    found = done.watched[mode]["syncs"]
    assert {region for region in found if region != "between"} == set()


@pytest.mark.parametrize("mode", MODES)
def test_no_host_sync_between_the_micro_batches_of_a_step(done: Done, mode: str) -> None:
    # Between a step's first forward and its last backward, from the second step on: DPO's step-0
    # check is in the first.
    assert done.watched[mode]["syncs"]["between"] == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_results_equal_an_ordinary_run_on_the_cpu(done: Done, mode: str, stage: str) -> None:
    found, wanted = (
        load_file(done.home / run / stage / "adapter_model.safetensors") for run in (mode, "cpu")
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        off = float((found[name] - tensor).norm() / tensor.norm())
        assert off < 5e-5, name
    metrics = [read_jsonl(done.home / run / stage / "metrics.jsonl") for run in (mode, "cpu")]
    for ours, theirs in zip(*metrics, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_habanas_kernels_work_where_they_are_asked_for(done: Done) -> None:
    assert done.watched["eager"]["fused"] == [0, []]
    assert done.watched["eager"]["optimizers"] == 0
    calls, lengths = done.watched["lazy"]["fused"]
    assert calls > 0
    assert lengths == [128]
    assert done.watched["lazy"]["optimizers"] == 2
    assert done.summary("lazy", "sft")["attention"] == "fused"
    assert done.summary("eager", "sft")["attention"] == "dense"


def test_the_run_says_what_filling_up_costs(done: Done) -> None:
    eager, lazy, cpu = (
        (done.home / run / "said.txt").read_text() for run in ("eager", "lazy", "cpu")
    )
    assert "sft: buckets: " in eager
    assert "(micro-batches of 128, 256 tokens)" in eager
    assert "sft: pad_max: " in lazy
    assert "% of the tokens fed are padding (micro-batches of 128 tokens)" in lazy
    assert "padding" not in cpu


def _tandem(home: Path, *argv: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tandem", *argv],
        cwd=home, env=environment(home, **extra), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_record_beyond_the_declared_lengths_stops_before_the_first_step(done: Done) -> None:
    data = done.home / "cpu" / "conversations.jsonl"
    ran = _tandem(
        done.home, "sft", "--model_name_or_path", "model", "--dataset_name", str(data),
        "--output_dir", "too-long", "--use_habana", "--hpu_buckets", "8", "16",
        "--max_length", "128", "--max_steps", "1",
    )  # fmt: skip
    assert ran.returncode == 2, ran.stderr
    assert f"hpu.buckets: {data}, row " in ran.stderr
    assert "and the lengths are 8, 16. Add a length of at least" in ran.stderr
    assert not (done.home / "too-long" / "metrics.jsonl").exists()


def test_a_bridge_without_a_card_is_said(done: Done) -> None:
    data = done.home / "cpu" / "conversations.jsonl"
    argv = [
        "sft",
        "--model_name_or_path",
        "model",
        "--dataset_name",
        str(data),
        "--output_dir",
        "n",
        "--max_length",
        "200",
    ]
    ran = _tandem(done.home, *argv, "--use_habana", STUB_CARDS="0")
    assert ran.returncode == 2
    assert "device: hpu was asked for, but the bridge sees no Gaudi card here" in ran.stderr
