"""Optimizers, averages and noise take the same steps under every engine that they can work in.

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

from .orders import LIMITS, Done, Order, adapter, copied, distance, drift, first_gradients, started
from .orders import stopped as stopped_folder

FREE: dict[str, Any] = {"optimizer": "schedule_free_adamw", "lr_scheduler": "constant"}
NOISE: dict[str, Any] = {"optimizer": "adamw", "neftune_alpha": 5.0}
SEVERAL = ("ddp", "deepspeed-zero2", "deepspeed-zero3", "fsdp2")
# Where each works in several processes, and in which precision a step's direction is certain: the
# sign of a number near 0 is not, in float32.
ENGINES_OF: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "lion": ("float64", SEVERAL, {}),
    "muon": ("float64", ("ddp",), {}),
    "adafactor": ("float32", ("ddp",), {}),
    "adamw_8bit": ("float32", ("ddp",), {}),
    "schedule_free_adamw": ("float32", ("ddp", "fsdp2"), FREE),
    "ema": ("float32", SEVERAL, {"optimizer": "adamw", "ema_decay": 0.6}),
    "noise": ("float32", ("ddp", "deepspeed-zero3", "fsdp2"), NOISE),
}
SCORED = ("schedule_free_adamw", "ema", "noise")


def _order(name: str, engine: str, folder: str) -> Order:
    dtype, _, more = ENGINES_OF[name]
    settings = json.dumps({"optimizer": name, "weight_decay": 0.01, **more})
    keep = "best" if name in SCORED else ""
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
    _order("noise", "ddp", "again-noise"),
    *(_order("ema", engine, f"again-ema-{engine}") for engine in SEVERAL[1:]),
]
# Stopped after the first step in one process, and finished in two, from a copy.
ONE = replace(_order("ema", "single", "one-ema"), trouble="SIGTERM")
MOVED = _order("ema", "deepspeed-zero3", "moved-ema")
# In one process and in two: other budgets, every record alone, activations computed once more.
NOISY = [
    replace(_order("noise", "single", f"noise-{budget}"), budget=budget) for budget in (512, 1)
]
NOISY += [
    replace(order, folder=f"{order.folder}-float64", dtype="float64", checkpointing=True)
    for order in NOISY
]
PLAIN = replace(WHOLE["noise"], folder="plain", more="{}")
NOISY_WHOLE = replace(WHOLE["noise"], folder="noise-float64", dtype="float64")
NOISY_ALONE_IN_TWO = replace(_order("noise", "ddp", "noise-two"), budget=1)
# No score improves by so much on the one after the first step.
EARLY = Order(
    "sft", "early", engine="fsdp2", budget=512,
    more=json.dumps({
        "validation": {"fraction": 0.2, "steps": 1},
        "early_stopping": {"patience": 1, "min_delta": 100.0},
    }),
)  # fmt: skip
MUON_SPREAD = _order("muon", "fsdp2", "muon-fsdp2")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """All orders of this module, carried out."""
    done = started(tmp_path_factory.mktemp("optimizers"))
    done.alone([*WHOLE.values(), *NOISY, NOISY_WHOLE, PLAIN])
    stopped = [replace(order, trouble="SIGTERM") for order in AGAIN]
    done.alone([ONE])
    copied(done.home, stopped_folder(ONE), MOVED.folder)
    done.launched(2, [*IN_TWO, *stopped, *AGAIN, MOVED, MUON_SPREAD, NOISY_ALONE_IN_TWO, EARLY])
    return done


@pytest.mark.parametrize("order", IN_TWO, ids=lambda order: order.folder)
def test_an_optimizer_ends_with_the_same_parameters_under_every_engine(
    done: Done, order: Order
) -> None:
    _same(done, order, IN_TWO[order])


def test_an_average_goes_on_under_another_engine(done: Done) -> None:
    _same(done, MOVED, "ema")
    assert "engine single -> deepspeed-zero3" in done.outcomes[MOVED][0].said


@pytest.mark.parametrize("order", [*NOISY, NOISY_ALONE_IN_TWO], ids=lambda order: order.folder)
def test_noise_does_not_depend_on_how_the_work_is_packed(done: Done, order: Order) -> None:
    whole = NOISY_WHOLE if order.dtype == "float64" else WHOLE["noise"]
    _same(done, order, whole.folder)
    of_gradients, *_ = LIMITS[order.dtype]
    gradients = [first_gradients(done.home, folder) for folder in (order.folder, whole.folder)]
    assert distance(*gradients) < of_gradients


def test_noise_acts_in_training_alone(done: Done) -> None:
    with_noise, without = (done.home / name for name in ("noise", "plain"))
    assert distance(adapter(done.home, "noise"), adapter(done.home, "plain")) > 1e-3
    first = [read_jsonl(folder / "validation.jsonl")[0] for folder in (with_noise, without)]
    assert first[0]["eval_loss"] == first[1]["eval_loss"]
    losses = [read_jsonl(folder / "metrics.jsonl")[0]["loss"] for folder in (with_noise, without)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def test_all_processes_end_early_at_the_same_step(done: Done) -> None:
    assert [outcome.error for outcome in done.outcomes[EARLY]] == ["", ""]
    early = read_json(done.home / EARLY.folder / "summary.json")["early_stopping"]
    assert (early["step"], early["of"], early["best_step"]) == (2, 3, 1)
    first, second = done.outcomes[EARLY]
    assert first.said.count("early stopping after step 2 of 3") == 1
    assert second.said == ""


def _same(done: Done, order: Order, whole: str) -> None:
    assert {outcome.error for outcome in done.outcomes[order]} == {""}
    found, wanted = (adapter(done.home, folder) for folder in (order.folder, whole))
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
    never_stopped = next(o.folder for o in IN_TWO if replace(o, folder=order.folder) == order)
    found, never = (adapter(done.home, folder) for folder in (order.folder, never_stopped))
    assert all(torch.equal(found[key], never[key]) for key in never)


@pytest.mark.parametrize("name", ["schedule_free_adamw", "ema"])
def test_a_spread_average_is_scored_as_a_whole_one(done: Done, name: str) -> None:
    again = [order.folder for order in [*AGAIN, MOVED] if order.more == WHOLE[name].more]
    several = [order.folder for order, whole in IN_TWO.items() if whole == name]
    whole, *spread = (
        read_jsonl(done.home / folder / "validation.jsonl") for folder in (name, *several, *again)
    )
    assert len(spread) in (3, 8)
    assert [line["step"] for line in whole] == [0, 2, 3]
    for lines in spread:
        for line, like in zip(lines, whole, strict=True):
            assert line["eval_loss"] == pytest.approx(like["eval_loss"], rel=2e-5)


def test_an_optimizer_of_whole_matrices_is_refused_where_they_are_cut(done: Done) -> None:
    for outcome in done.outcomes[MUON_SPREAD]:
        assert outcome.code == 2
        assert "optimizer: muon cannot work on shards of each weight" in outcome.message
    assert not (done.home / MUON_SPREAD.folder).exists()
