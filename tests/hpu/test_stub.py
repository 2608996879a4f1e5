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
from .smoke_script import run_script

ROOT = Path(__file__).resolve().parents[2]
STUB = Path(__file__).parent / "stub"
CARDS = "STUB_CARDS"
MODES = ("eager", "lazy")


@dataclass(frozen=True)
class Done:
    """Both modes' runs: what was watched, and the folders."""

    home: Path
    watched: dict[str, Any]

    def summary(self, mode: str, stage: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / mode / stage / "summary.json").read_text())
        return found


def environment(home: Path) -> dict[str, str]:
    """A process's environment with the stub in it, and no launcher."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PT_", "WORLD_SIZE"))}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), str(STUB)]),
        "XDG_CACHE_HOME": str(home / "cache"),
        "TANDEM_KERNELS": "off",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "error",
    }


def drive(home: Path, *arguments: str) -> dict[str, Any]:
    """What the driver says at its end."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.hpu.driver", *arguments],
        cwd=ROOT, env=environment(home), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def in_files(home: Path, *flags: str) -> list[str]:
    """A command on the files that the CPU's run has left."""
    model, data = str(home / "model"), str(home / "cpu" / "conversations.jsonl")
    argv = ["sft", "--model_name_or_path", model, "--dataset_name", data, "--use_habana"]
    return [*argv, "--output_dir", str(home / "refused"), *flags]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    home = tmp_path_factory.mktemp("hpu")
    make_model_folder(home / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache-cpu"))
        run_stages(home / "cpu", home / "model")
    (of_script,) = run_script(home, "smoke", STEPS="1", ONLY="sft-p*")
    of_script[of_script.index("--batch_size") + 1] = "1"
    commands: dict[str, dict[str, Any]] = {
        "too long": {
            "argv": in_files(home, "--hpu_buckets", "8", "16", "--max_length", "128"),
            "variables": {},
        },
        "no card": {"argv": in_files(home, "--max_length", "200"), "variables": {CARDS: "0"}},
        "script": {"argv": of_script, "variables": {}},
    }
    watched = drive(home, str(home), *map(json.dumps, commands.values()))
    watched["commands"] = dict(zip(commands, watched["commands"], strict=True))
    return Done(home, watched)


@pytest.mark.parametrize("mode", MODES)
def test_the_bridge_is_found_and_told_its_mode_before_torch(done: Done, mode: str) -> None:
    told = done.watched["told"] if mode == "lazy" else drive(done.home, "--told", mode)
    assert told["early"], "the mode is set before torch is imported"
    flag = "1" if mode == "lazy" else "0"
    assert told["modes"] == {"PT_HPU_LAZY_MODE": flag, "PT_ENABLE_INT64_SUPPORT": "1"}
    seen = done.watched[mode]
    assert (seen["kind"], seen["weights"]) == ("hpu", "torch.bfloat16")
    assert seen["lazy"] is (mode == "lazy")
    # transformers patches torch when the device is chosen, not in the middle of a run.
    assert seen["found"] == [True, True, "hpu_backend_compile"]


def test_lazy_mode_marks_each_backward_and_each_step(done: Done) -> None:
    assert done.watched["eager"]["marks"] == 0
    summaries = [done.summary("lazy", stage) for stage in ("sft", "dpo", "kto")]
    assert done.watched["lazy"]["marks"] == sum(s["micro_batches"] + s["steps"] for s in summaries)
    assert all(s["steps"] == SETTINGS["max_steps"] for s in summaries)
    assert done.summary("eager", "sft")["micro_batches"] > done.summary("eager", "sft")["steps"]


@pytest.mark.parametrize("mode", MODES)
def test_only_declared_shapes_reach_the_model(done: Done, mode: str) -> None:
    seen = done.watched[mode]
    lengths = set(LENGTHS) if mode == "eager" else {128}
    assert {rows for rows, _, _ in seen["inputs"]} == lengths
    # Records of SFT, of DPO and of KTO differ in density, so each stage declares its own.
    assert len(seen["inputs"]) <= 3 * len(lengths)
    # Every operator and every result's shape is the same for every micro-batch of a shape, in
    # SFT, DPO and KTO, and in each reference pass: DPO's, KTO's and that of KTO's other answers.
    # But dropout makes its constants in the first forward, and a step's first backward sets
    # gradients where the others add to them.
    for name, count in seen["streams"].items():
        assert count <= {"forward": 4, "backward": 5, "reference": 3}[name.split()[0]], name
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
@pytest.mark.parametrize("stage", ["sft", "dpo", "kto"])
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
    assert done.watched["lazy"]["optimizers"] == 3
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


def test_a_record_beyond_the_declared_lengths_stops_before_the_first_step(done: Done) -> None:
    ran = done.watched["commands"]["too long"]
    assert ran["code"] == 2, ran["said"]
    assert f"hpu.buckets: {done.home / 'cpu' / 'conversations.jsonl'}, row " in ran["said"]
    assert "and the lengths are 8, 16. Add a length of at least" in ran["said"]
    assert not (done.home / "refused" / "metrics.jsonl").exists()


def test_a_bridge_without_a_card_is_said(done: Done) -> None:
    ran = done.watched["commands"]["no card"]
    assert ran["code"] == 2
    assert "device: hpu was asked for, but the bridge sees no Gaudi card here" in ran["said"]


def test_the_smoke_scripts_data_trains(done: Done) -> None:
    """One step of one command of scripts/hpu_smoke.sh: nothing but the card is missing."""
    ran = done.watched["commands"]["script"]
    assert ran["code"] == 0, ran["said"]
    assert (done.home / "smoke" / "sft-pad-max" / "summary.json").is_file()
