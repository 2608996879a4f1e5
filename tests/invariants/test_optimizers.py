"""Every optimizer takes the same steps under every engine that it can work in.

All launched work happens in one launch of two processes; each order is compared with one process
that has all of a step's records in few micro-batches.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from tandem.storage.atomic_files import read_json, read_jsonl

from .orders import LIMITS, Done, Order, adapter, distance, drift, started

FREE: dict[str, Any] = {"optimizer": "schedule_free_adamw", "lr_scheduler": "constant"}
# Where each works in several processes, and in which precision a step's direction is certain: the
# sign of a number near 0 is not, in float32.
ENGINES_OF: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "lion": ("float64", ("ddp", "deepspeed-zero2", "deepspeed-zero3", "fsdp2"), {}),
    "muon": ("float64", ("ddp",), {}),
    "adafactor": ("float32", ("ddp",), {}),
    "adamw_8bit": ("float32", ("ddp",), {}),
    "schedule_free_adamw": ("float32", ("ddp", "fsdp2"), FREE),
}


def _order(name: str, engine: str, folder: str) -> Order:
    dtype, _, more = ENGINES_OF[name]
    settings = json.dumps({"optimizer": name, "weight_decay": 0.01, **more})
    keep = "best" if name == "schedule_free_adamw" else ""
    return Order("sft", folder, dtype, engine=engine, budget=512, keep=keep, more=settings)


WHOLE = {name: replace(_order(name, "single", name), budget=4096) for name in ENGINES_OF}
IN_TWO = {
    _order(name, engine, f"{name}-{engine}"): name
    for name, (_, engines, _) in ENGINES_OF.items()
    for engine in engines
}
# Stopped after the first step, and finished.
AGAIN = [
    _order("lion", "deepspeed-zero3", "again-lion"),
    _order("schedule_free_adamw", "fsdp2", "again-free"),
]
MUON_SPREAD = _order("muon", "fsdp2", "muon-fsdp2")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """All orders of this module, carried out."""
    done = started(tmp_path_factory.mktemp("optimizers"))
    done.alone(list(WHOLE.values()))
    stopped = [replace(order, trouble="SIGTERM") for order in AGAIN]
    done.launched(2, [*IN_TWO, *stopped, *AGAIN, MUON_SPREAD])
    return done


@pytest.mark.parametrize("order", IN_TWO, ids=lambda order: order.folder)
def test_an_optimizer_ends_with_the_same_parameters_under_every_engine(
    done: Done, order: Order
) -> None:
    assert [outcome.error for outcome in done.outcomes[order]] == ["", ""]
    found, wanted = (adapter(done.home, folder) for folder in (order.folder, IN_TWO[order]))
    # What DeepSpeed moves is float32, whatever the model computes in.
    precision = "float32" if "deepspeed" in order.engine else order.dtype
    _, of_parameters, of_drift = LIMITS[precision]
    assert distance(found, wanted) < of_parameters
    assert drift(found, wanted) < of_drift
    assert read_json(done.home / order.folder / "summary.json")["engine"] == order.engine


@pytest.mark.parametrize("order", AGAIN, ids=lambda order: order.folder)
def test_a_run_that_was_stopped_ends_with_the_same_bits(done: Done, order: Order) -> None:
    assert [outcome.error for outcome in done.outcomes[order]] == ["", ""]
    assert "(step 1 of 3)" in done.outcomes[order][0].said
    name = json.loads(order.more)["optimizer"]
    found, never = (adapter(done.home, f) for f in (order.folder, f"{name}-{order.engine}"))
    assert all(torch.equal(found[key], never[key]) for key in never)


def test_a_spread_average_is_scored_as_a_whole_one(done: Done) -> None:
    whole, *spread = (
        read_jsonl(done.home / folder / "validation.jsonl")
        for folder in ("schedule_free_adamw", "schedule_free_adamw-fsdp2", "again-free")
    )
    assert [line["step"] for line in whole] == [0, 2, 3]
    for lines in spread:
        for line, like in zip(lines, whole, strict=True):
            assert line["eval_loss"] == pytest.approx(like["eval_loss"], rel=2e-5)


def test_an_optimizer_of_whole_matrices_is_refused_where_they_are_cut(done: Done) -> None:
    for outcome in done.outcomes[MUON_SPREAD]:
        assert outcome.code == 2
        assert "optimizer: muon cannot work on shards of each weight" in outcome.message
    assert not (done.home / MUON_SPREAD.folder).exists()
