"""What watches a stage does the same in several processes, under every engine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tandem.storage.atomic_files import read_json, read_jsonl

from ..invariants.orders import ROOT, torchrun
from .made_inputs import make_conversations, make_model_folder, make_pairs
from .watched_processes import WATCH, Watched, as_json, watch

SPREAD = ("deepspeed-zero3", "fsdp2")
ALONE = {
    "sft": Watched("alone-sft"),
    "dpo": Watched("alone-dpo", "dpo"),
    "full": Watched("alone-full", full=True),
}
ASKED = (
    *(Watched(f"sft-{engine}", engine=engine) for engine in ("ddp", *SPREAD)),
    Watched("full-fsdp2", engine="fsdp2", full=True),
    Watched("dpo-ddp", "dpo", engine="ddp"),
)
PLAIN = tuple(Watched(f"plain-{engine}", engine=engine, samples=False) for engine in SPREAD)
STOPPED = Watched("stopped", callbacks=("watch:enough", "watch:told"))
BROKEN = Watched("broken", callbacks=("watch:broken", "watch:told"))
MISSING = Watched("missing", callbacks=("watch:none",))
MENDED = Watched("broken", callbacks=("watch:told",), trackers=("tensorboard",))
ORDERS = (*ASKED, *PLAIN, STOPPED, BROKEN, MISSING, MENDED)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one process has done ALONE, and two ORDERS."""
    home = tmp_path_factory.mktemp("watched")
    make_model_folder(home / "model")
    for name, count in (("a", 8), ("b", 11)):
        make_conversations(home / f"sft-{name}.jsonl", count)
        make_pairs(home / f"dpo-{name}.jsonl", count)
    (home / "watch.py").write_text(WATCH)
    (home / "orders.json").write_text(as_json(ORDERS))
    done = subprocess.run(
        [*torchrun(2), "-m", "tests.stages.watched_processes", str(home)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        for order in ALONE.values():
            assert watch(order, home) == {}
    return home


def ended(home: Path, order: Watched) -> list[dict[str, Any]]:
    """How an order ended, by rank."""
    place = ORDERS.index(order)
    return [json.loads((home / f"ended.rank{rank}.json").read_text())[place] for rank in (0, 1)]


@pytest.mark.parametrize("order", ASKED, ids=lambda order: order.folder)
def test_answers_and_losses_are_those_of_one_process(home: Path, order: Watched) -> None:
    assert ended(home, order) == [{}, {}]
    alone = home / ALONE["full" if order.full else order.kind].folder
    found, wanted = (read_jsonl(f / "samples.jsonl") for f in (home / order.folder, alone))
    assert [line["step"] for line in found] == [0, 0, 3, 3]
    assert found == wanted
    for name in ("metrics.jsonl", "validation.jsonl"):
        lines, like = (read_jsonl(f / name) for f in (home / order.folder, alone))
        for line, one in zip(lines, like, strict=True):
            keys = [key for key in one if "loss" in key]
            assert len(keys) == 3  # of all, and of each set
            for key in keys:
                assert line[key] == pytest.approx(one[key], rel=1e-5), key


@pytest.mark.parametrize("order", PLAIN, ids=lambda order: order.folder)
def test_answers_change_no_bit_where_weights_are_spread(home: Path, order: Watched) -> None:
    folders = (order.folder, order.folder.replace("plain", "sft"))
    plain, asked = (load_file(home / f / "adapter_model.safetensors") for f in folders)
    assert all(torch.equal(plain[name], asked[name]) for name in plain)


def test_the_stop_that_one_function_asks_for_reaches_all(home: Path) -> None:
    first, other = ended(home, STOPPED)
    assert (first["code"], other["code"]) == (3, 3)
    assert (first["reported"], other["reported"]) == (False, True)
    assert "after step 2 of 3: callback watch:enough asked for it" in first["error"]
    assert (home / "stopped" / "checkpoints" / "step-000002").is_dir()


def test_a_function_that_raises_ends_all_after_a_checkpoint(home: Path) -> None:
    first, other = ended(home, BROKEN)
    assert (first["code"], other["code"], other["reported"]) == (2, 2, True)
    assert "watch:broken raised RuntimeError: broken on purpose (" in first["error"]
    assert f"{home / 'watch.py'}, line 15) when told of step 2. A checkpoint of" in first["error"]
    assert ended(home, MENDED) == [{}, {}]
    assert read_json(home / "broken" / "manifest.json")["status"] == "finished"
    told = (home / "broken" / "told.txt").read_text().split("\n")[:-1]
    assert told == [
        "0 scores 0", "0 step 1", "0 step 2", "0 checkpoint 2",  # then the command once more
        "0 scores 3", "0 step 3", "0 checkpoint 3", "0 end 3",
    ]  # fmt: skip
    assert len(list((home / "broken").glob("trackers/tensorboard/*/events*"))) == 1


def test_a_function_that_is_not_there_ends_all_before_training(home: Path) -> None:
    first, other = ended(home, MISSING)
    assert (first["code"], other["code"], other["reported"]) == (2, 2, True)
    assert "callbacks: watch has no none" in first["error"]
    assert not (home / "missing" / "checkpoints").exists()
