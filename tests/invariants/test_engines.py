"""The same parameters and held-out scores under every engine, whatever befalls its processes.

Every engine carries out one kind of training in two processes and the other in three, or in the two
of test_schedules. What an engine does is otherwise the same for both: it sums gradients, applies
them and spreads what it holds. So float64, checkpointing and scores need one engine of a sort.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tandem.storage.atomic_files import read_json, read_jsonl

from .orders import (
    BASE,
    COUPLED,
    ENGINES,
    KINDS,
    LIMITS,
    PISSA,
    RICH,
    STARTED,
    Done,
    Order,
    adapter,
    copied,
    distance,
    drift,
    first_gradients,
    started,
    stopped,
    whole,
)

SPREAD = ("deepspeed-zero3", "fsdp2")
NOT_NEEDED = Order("dpo", "dpo-float64-whole", "float64")
ALONE = [Order(kind, f"{kind}-alone", keep="last") for kind in KINDS]


def _order(kind: str, processes: int, engine: str, keep: str = "") -> Order:
    folder = f"{kind}-float32-{processes}-{engine}"
    return Order(kind, folder, budget=512, engine=engine, keep=keep)


# The last of three steps has a single record, so that one of two processes has no micro-batch,
# though all gather each of them.
IN_TWO = [
    *(_order("sft", 2, engine, "best") for engine in ("ddp", "deepspeed-zero3")),
    *(_order("sft", 2, engine) for engine in ("deepspeed-zero2", "fsdp2")),
    Order("sft", "sft-float64-2-fsdp2", "float64", 512, checkpointing=True, engine="fsdp2"),
    *(
        Order("sft", f"sft-rich-2-{engine}", budget=512, engine=engine, adapter="rich")
        for engine in ENGINES[1:]
    ),
    *(
        Order("sft", f"sft-pissa-2-{engine}", budget=512, engine=engine, adapter="pissa")
        for engine in SPREAD
    ),
    *(
        Order("dpo", f"dpo-started-2-{engine}", budget=512, engine=engine, adapter="started")
        for engine in SPREAD
    ),
]
# Three divide nothing evenly that engines divide; ddp divides nothing.
IN_THREE = [
    _order("dpo", 3, engine, "" if engine == "deepspeed-zero3" else "best")
    for engine in ENGINES[1:]
]
AGAIN_PISSA = Order("sft", "again-pissa", engine="fsdp2", budget=512, adapter="pissa")
# Sees every step of other examples beforehand, in which all processes take part.
IN_THREE.append(Order("dpo", "kto-3-fsdp2", "float64", 512, engine="fsdp2", loss="kto"))
# All weights are trained, embeddings and head among them.
FULL = {kind: Order(kind, f"{kind}-float32-full-whole", adapter="full") for kind in KINDS}
IN_THREE += [
    Order("sft", f"full-3-{engine}", budget=512, engine=engine, adapter="full")
    for engine in ENGINES
]
FULL_IN_TWO = [
    Order("dpo", f"full-2-{engine}", budget=512, engine=engine, adapter="full")
    for engine in ("deepspeed-zero2", *SPREAD)
]
# Stopped after the first step and finished; the reference is that of the first start.
FULL_AGAIN = [
    replace(order, folder=order.folder.replace("full", "full-again")) for order in FULL_IN_TWO
]
# DeepSpeed files of the user's own: stage 1, and an optimizer whose state is kept on the host.
CONFIGURED = {
    "one.json": {"stage": 1},
    "offloaded.json": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}
STAGE_ONE = Order("sft", "stage-one", engine="one.json", budget=512)
# Stopped after the first step and finished.
AGAIN = [
    Order(
        "sft",
        f"again-{engine}",
        engine=engine,
        budget=512,
        keep="best" if engine == "fsdp2" else "",
    )
    for engine in ("deepspeed-zero2", *SPREAD, "offloaded.json")
]
AGAIN_RICH = [
    Order("sft", f"again-rich-{engine}", engine=engine, budget=512, adapter="rich")
    for engine in ENGINES[1:]
]
ONE = Order("dpo", "single", engine="single")
# The same, but finished under another engine, from a copy. All write and read the same files, so
# that what `single` finishes shows what each of them writes, and AGAIN what each of them reads.
MOVES = [*((order, "single") for order in AGAIN[:3]), (ONE, "fsdp2")]
# Memory runs out in the last rank alone. Under which engine makes a difference once gradients are
# there, so that one has the whole list, with another process to agree with; the others have a
# backward that fails.
NO_MEMORY = [
    Order(kind, f"{kind}-{engine}-{trouble}", engine=engine, trouble=f"no memory {trouble}")
    for engine, kind, trouble in (
        ("single", "sft", "backward"),
        ("deepspeed-zero2", "dpo", "for long"),
        ("ddp", "sft", "backward"),
        ("ddp", "sft", "at first"),
        ("ddp", "sft", "in between"),
        ("ddp", "dpo", "in the reference"),
    )
]
# Which ends all processes; tests/cli/test_memory.py has fsdp2, and a launcher that goes on.
NO_MEMORY_SPREAD = Order(
    "sft", "memory-zero3", engine="deepspeed-zero3", trouble="no memory in between"
)
AFTER = replace(NO_MEMORY_SPREAD, trouble="", engine="single")
NO_ROOM = [
    Order("sft", f"room-{engine}", engine=engine, trouble="no memory for ever")
    for engine in ("single", "ddp")
]


def _stopped(order: Order) -> Order:
    return replace(order, trouble="SIGTERM")


def _moved(order: Order, engine: str) -> Order:
    return replace(order, folder=f"{order.folder}-{engine}", engine=engine)


SCORED = [
    *(order for order in (*IN_TWO, *IN_THREE, *AGAIN) if order.keep),
    # Stopped after one of three steps in two processes, finished by one.
    *(_moved(order, engine) for order, engine in MOVES if order.keep),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """All orders of this module, carried out in two launches."""
    done = started(tmp_path_factory.mktemp("engines"))
    for name, zero in CONFIGURED.items():
        (done.home / name).write_text(json.dumps({"zero_optimization": zero}))
    troubled = [*NO_MEMORY, *NO_ROOM]
    local = [order for order in troubled if order.engine == "single"]
    shared = [order for order in troubled if order.engine != "single"]
    plain = [*(order for order in BASE if order != NOT_NEEDED), *ALONE, RICH["sft"], PISSA, STARTED]
    plain += [*(order for order in COUPLED if order.loss == "kto"), *FULL.values()]
    done.alone([*plain, *local, _stopped(ONE)])
    back = [_moved(order, engine) for order, engine in MOVES if engine == "single"]
    there = [_moved(order, engine) for order, engine in MOVES if engine != "single"]
    for order in there:
        copied(done.home, stopped(ONE), order.folder)
    again = [*map(_stopped, AGAIN), *AGAIN, *map(_stopped, AGAIN_RICH), *AGAIN_RICH]
    again += [_stopped(AGAIN_PISSA), AGAIN_PISSA]
    again += [*FULL_IN_TWO, *map(_stopped, FULL_AGAIN), *FULL_AGAIN]
    done.launched(2, [*IN_TWO, STAGE_ONE, *again, *there, *shared, NO_MEMORY_SPREAD])
    done.launched(3, IN_THREE)
    for order, engine in MOVES[: len(back)]:
        copied(done.home, stopped(order), _moved(order, engine).folder)
    done.alone([AFTER, *back])
    return done


def same_as_whole(done: Done, order: Order) -> None:
    """An order's adapter is what one process makes with everything in few micro-batches."""
    assert [outcome.message for outcome in done.outcomes[order]] == [""] * len(done.outcomes[order])
    _, of_parameters, of_drift = LIMITS[order.dtype]
    parameters = [adapter(done.home, folder) for folder in (order.folder, whole(order))]
    assert distance(*parameters) < of_parameters
    assert drift(*parameters) < of_drift


@pytest.mark.parametrize("order", [*IN_TWO, *IN_THREE], ids=lambda order: order.folder)
def test_every_engine_computes_the_same(done: Done, order: Order) -> None:
    same_as_whole(done, order)
    of_gradients = LIMITS[order.dtype][0]
    gradients = [first_gradients(done.home, folder) for folder in (order.folder, whole(order))]
    assert distance(*gradients) < of_gradients
    processes = 3 if order in IN_THREE else 2
    engine = order.engine
    summary = read_json(done.home / order.folder / "summary.json")
    assert (summary["processes"], summary["engine"]) == (processes, engine)
    assert f"{processes} processes on cpu ({engine})" in done.outcomes[order][0].said


@pytest.mark.parametrize(("order", "engine"), MOVES, ids=lambda v: getattr(v, "folder", v))
def test_a_checkpoint_goes_on_under_another_engine(done: Done, order: Order, engine: str) -> None:
    assert done.outcomes[_stopped(order)][0].error == "Stopped"
    after = _moved(order, engine)
    same_as_whole(done, after)
    said = done.outcomes[after][0].said
    assert f"engine {order.engine} -> {engine}" in said
    assert "(step 1 of 3)" in said
    steps = [line["step"] for line in read_jsonl(done.home / after.folder / "metrics.jsonl")]
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(
    "order", [STAGE_ONE, *AGAIN, *AGAIN_RICH, AGAIN_PISSA], ids=lambda order: order.folder
)
def test_a_stopped_run_ends_with_the_same_bits(done: Done, order: Order) -> None:
    same_as_whole(done, order)
    # ZeRO-1 and offloading change where things are, not one bit of them.
    like = "deepspeed-zero2" if order.engine in CONFIGURED else order.engine
    never = adapter(done.home, f"sft-{order.adapter or order.dtype}-2-{like}")
    found = adapter(done.home, order.folder)
    assert all(torch.equal(found[name], never[name]) for name in never)


@pytest.mark.parametrize("order", FULL_IN_TWO, ids=lambda order: order.folder)
def test_a_stopped_run_of_all_weights_keeps_its_reference_and_its_bits(
    done: Done, order: Order
) -> None:
    again = FULL_AGAIN[FULL_IN_TWO.index(order)]
    assert done.outcomes[_stopped(again)][0].error == "Stopped"
    for one in (order, again):
        same_as_whole(done, one)
    found, never = (adapter(done.home, one.folder) for one in (again, order))
    assert all(torch.equal(found[name], never[name]) for name in never)
    # What is left is a model, in the format that its base is stored in.
    left = load_file(done.home / order.folder / "model.safetensors")
    assert all(torch.equal(left[name], never[name]) for name in never)


@pytest.mark.parametrize("order", NO_MEMORY, ids=lambda order: order.folder)
def test_a_step_that_runs_out_of_memory_is_done_finer(done: Done, order: Order) -> None:
    same_as_whole(done, order)
    said = done.outcomes[order][0].said
    tokens = read_json(done.home / order.folder / "memory.json")["tokens_per_microbatch"]
    assert tokens < order.budget
    assert said.count(f"out of memory; continuing with {tokens} tokens a micro-batch") == 1
    assert [outcome.said for outcome in done.outcomes[order][1:]] == [""] * (
        len(done.outcomes[order]) - 1
    )


@pytest.mark.parametrize("order", NO_ROOM, ids=lambda order: order.folder)
def test_a_record_that_does_not_fit_alone_is_named(done: Done, order: Order) -> None:
    for outcome in done.outcomes[order]:
        assert outcome.code == 2
        assert "does not fit even alone. Lower max_length" in outcome.message
        assert "sft.jsonl, row" in outcome.message


def test_spread_weights_begin_anew_with_less(done: Done) -> None:
    lost, failed = done.outcomes[NO_MEMORY_SPREAD]
    assert (failed.error, failed.code) == ("Stopped", 3)
    assert "out of memory with" in failed.message
    assert "lost contact" in lost.message
    same_as_whole(done, AFTER)
    less = read_json(done.home / AFTER.folder / "memory.json")["tokens_per_microbatch"]
    assert less < AFTER.budget
    assert f"{less} tokens a micro-batch" in done.outcomes[AFTER][0].said


def test_ddp_and_zero2_agree_to_the_bit(done: Done) -> None:
    ddp = adapter(done.home, "sft-float32-2-ddp")
    zero2 = adapter(done.home, "sft-float32-2-deepspeed-zero2")
    assert all(torch.equal(ddp[name], zero2[name]) for name in ddp)


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_changes_no_bit_of_training(done: Done, kind: str) -> None:
    scored, plain = (adapter(done.home, f"{kind}-{name}") for name in ("alone", "float32-whole"))
    assert all(torch.equal(scored[name], plain[name]) for name in plain)


@pytest.mark.parametrize("order", SCORED, ids=lambda order: order.folder)
def test_every_engine_scores_the_same(done: Done, order: Order) -> None:
    same_as_whole(done, order)
    found, expected = (
        read_jsonl(done.home / folder / "validation.jsonl")
        for folder in (order.folder, f"{order.kind}-alone")
    )
    assert [line["step"] for line in found] == [0, 2, 3]
    for line, like in zip(found, expected, strict=True):
        for name in like.keys() - {"eval_seconds"}:
            # Rounding decides which of two answers gained more before the first step.
            if name != "eval_rewards/accuracies" or line["step"]:
                assert line[name] == pytest.approx(like[name], rel=2e-5, abs=1e-5)
    assert read_json(done.home / order.folder / "summary.json")["kept_step"] == 3
    assert "the adapter of step 3 of 3 is kept" in done.outcomes[order][0].said
    assert not (done.home / order.folder / "best").exists()
