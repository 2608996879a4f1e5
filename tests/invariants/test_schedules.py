"""The same parameters however the work is scheduled, in one process and in two.

All that two processes do here happens in one launch. Both kinds of training are carried out in
float64, where nothing but the order of sums may differ, and in float32, as people train; what else
a schedule changes has a kind and a precision each, and in two processes, which add one sum over
processes to a step, what changes their number of micro-batches.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace

import pytest
import torch

from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.storage.folder_lock import folder_lock

from .orders import (
    BASE,
    COUPLED,
    FAULTS,
    KINDS,
    LIMITS,
    PISSA,
    RICH,
    STARTED,
    STEPS,
    Done,
    Order,
    adapter,
    distance,
    drift,
    first_gradients,
    started,
    whole,
)

# What must end like its whole: other budgets, records alone, nothing shared, recomputed.
IN_ONE = [
    *(replace(base, folder=f"{base.kind}-{base.dtype}-1-512", budget=512) for base in BASE),
    Order("sft", "sft-float32-1-alone", budget=1),
    Order("sft", "sft-float64-1-checkpointing", "float64", 512, checkpointing=True),
    Order("dpo", "dpo-float64-1-alone", "float64", 1),
    Order("dpo", "dpo-float64-1-unshared", "float64", 512, sharing=False),
    Order("dpo", "dpo-float32-1-checkpointing", budget=512, checkpointing=True),
    Order("sft", "sft-rich-1-alone", budget=1, checkpointing=True, adapter="rich"),
    Order("dpo", "dpo-rich-1-512", "float64", 512, adapter="rich"),
    Order("sft", "sft-pissa-1-alone", budget=1, adapter="pissa"),
    Order("dpo", "dpo-started-1-alone", budget=1, adapter="started"),
]
IN_TWO = [
    *(replace(base, folder=f"{base.kind}-{base.dtype}-2-512", budget=512) for base in BASE),
    Order("sft", "sft-float64-2-alone", "float64", budget=1),
    Order("dpo", "dpo-float64-2-checkpointing", "float64", 512, checkpointing=True),
    *(replace(order, folder=f"{order.loss}-2-512", budget=512) for order in COUPLED),
    Order("dpo", "dpo-rich-2-512", "float64", 512, adapter="rich"),
    Order("sft", "sft-pissa-2-512", budget=512, adapter="pissa"),
]
# A fault that float32's wider limits notice, float64's notice as well.
FAULTY = [
    *(Order("dpo", f"dpo-float32-{name}", budget=512, fault=name) for name in FAULTS),
    Order("sft", "sft-float32-leak", budget=512, fault="leak_to_the_neighbour"),
]
_SFT, _DPO = (Order(kind, "", budget=512) for kind in KINDS)
# In this process before the launch, then in two; and the other way round.
ONE_FIRST = replace(_DPO, folder="one-then-two")
TWO_FIRST = replace(_SFT, folder="two-then-one")
TWICE_TWO = replace(_SFT, folder="two-then-two")
STOPPED = [replace(order, trouble="SIGTERM") for order in (TWO_FIRST, TWICE_TWO)]
NOT_FINITE = replace(_SFT, folder="not-finite", trouble="not finite", budget=4096)
BUG = replace(_SFT, folder="bug", trouble="bug")
MISTAKE = replace(_SFT, folder="mistake", trouble="no such module")
LOCKED = replace(_SFT, folder="locked")
OTHER_DATA = replace(_SFT, folder="other-data", data="other.jsonl")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """All orders of this module, carried out."""
    done = started(tmp_path_factory.mktemp("orders"))
    plain = [*BASE, *COUPLED, *RICH.values(), PISSA, STARTED, *IN_ONE, *FAULTY]
    done.alone([*plain, replace(ONE_FIRST, trouble="SIGTERM")])
    in_two = [*IN_TWO, *STOPPED, ONE_FIRST, TWICE_TWO]
    in_two += [NOT_FINITE, BUG, MISTAKE, LOCKED, OTHER_DATA]
    with folder_lock(done.home / LOCKED.folder):
        done.launched(2, in_two)
    done.alone([TWO_FIRST])
    return done


@pytest.mark.parametrize("order", [*IN_ONE, *IN_TWO], ids=lambda order: order.folder)
def test_the_schedule_changes_neither_gradients_nor_parameters(done: Done, order: Order) -> None:
    assert [outcome.error for outcome in done.outcomes[order]] == [""] * len(done.outcomes[order])
    of_gradients, of_parameters, of_drift = LIMITS[order.dtype]
    gradients = [first_gradients(done.home, folder) for folder in (order.folder, whole(order))]
    assert distance(*gradients) < of_gradients
    parameters = [adapter(done.home, folder) for folder in (order.folder, whole(order))]
    assert distance(*parameters) < of_parameters
    assert drift(*parameters) < of_drift
    assert next(iter(parameters[0].values())).dtype == getattr(torch, order.dtype)


@pytest.mark.parametrize("order", FAULTY, ids=lambda order: order.folder)
def test_the_comparison_notices_faults(done: Done, order: Order) -> None:
    assert [outcome.error for outcome in done.outcomes[order]] == [""]
    parameters = [adapter(done.home, folder) for folder in (order.folder, whole(order))]
    gradients = [first_gradients(done.home, folder) for folder in (order.folder, whole(order))]
    # Each limit by far: none is so wide that a fault passes.
    of_gradients, of_parameters, of_drift = LIMITS["float32"]
    assert distance(*gradients) > 20 * of_gradients
    assert distance(*parameters) > 20 * of_parameters
    assert drift(*parameters) > 20 * of_drift


@pytest.mark.parametrize("order", IN_TWO, ids=lambda order: order.folder)
def test_both_processes_have_the_same_gradients(done: Done, order: Order) -> None:
    first, second = (first_gradients(done.home, order.folder, rank) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    norms = [(done.home / f"{order.folder}.rank{r}" / "norms.txt").read_text() for r in (0, 1)]
    assert norms[0] == norms[1]
    assert len(norms[0].split()) == STEPS


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_write_what_one_does(done: Done, kind: str) -> None:
    one, two = (done.home / f"{kind}-float64-{n}-512" for n in (1, 2))
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    timed = {"step_seconds", "tokens_per_second", "memory_bytes"}
    for a, b in zip(*(read_jsonl(f / "metrics.jsonl") for f in (one, two)), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - timed:
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-9), name
    summaries = [read_json(folder / "summary.json") for folder in (one, two)]
    counted = ("examples", "tokens", "padded_tokens", "shared_tokens", "steps", "examples_hash")
    for name in (*counted, "reference_computed"):
        assert summaries[0][name] == summaries[1][name], name
    assert [s["processes"] for s in summaries] == [1, 2]
    assert 0.5 < summaries[1]["fill"] <= summaries[0]["fill"] <= 1
    assert summaries[0]["imbalance"] == 1
    # One of the three steps has a single record, which one process computes: 2 instead of 1.
    assert 1.33 <= summaries[1]["imbalance"] < 1.4
    said = done.outcomes[Order(kind, two.name, "float64", 512)][0].said
    assert f"{kind}: 2 processes on cpu (ddp), float64" in said
    assert "% full, the busiest process 3" in said


def test_only_the_first_process_speaks(done: Done) -> None:
    for order in IN_TWO:
        first, second = done.outcomes[order]
        assert "3 steps" in first.said
        assert second.said == ""


def test_the_reference_pass_in_two_processes_stores_the_same_bits(done: Done) -> None:
    stored = []
    for processes in (1, 2):
        path = done.home / f"dpo-float32-{processes}-512.cache" / "tandem" / "reference.sqlite"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            rows = connection.execute("SELECT key, logp, tokens FROM checked ORDER BY key")
            stored.append(rows.fetchall())
    assert stored[0] == stored[1]
    assert len(stored[0]) == 2 * 25  # three units


def test_a_stop_asked_of_any_process_ends_all_after_the_same_step(done: Done) -> None:
    for order in STOPPED:
        first, second = done.outcomes[order]
        assert (first.error, first.code, first.told) == ("Stopped", 3, False)
        assert first.message.startswith("stopped after step 1 of 3; a checkpoint is written")
        assert (second.code, second.told) == (3, True)


def test_it_goes_on_in_another_number_of_processes_and_says_so(done: Done) -> None:
    for order, change in (
        (ONE_FIRST, "engine single -> ddp, processes 1 -> 2"),
        (TWO_FIRST, "engine ddp -> single, processes 2 -> 1"),
    ):
        first = done.outcomes[order][0]
        assert not first.error, first.message
        assert f"resuming with another schedule ({change})" in first.said
        assert "(step 1 of 3)" in first.said
        like = adapter(done.home, f"{order.kind}-float32-whole")
        assert distance(adapter(done.home, order.folder), like) < LIMITS["float32"][1]
        metrics = read_jsonl(done.home / order.folder / "metrics.jsonl")
        assert [line["step"] for line in metrics] == [1, 2, 3]


def test_two_processes_that_were_stopped_end_with_the_same_bits(done: Done) -> None:
    first = done.outcomes[TWICE_TWO][0]
    assert "another schedule" not in first.said
    assert "(step 1 of 3)" in first.said
    resumed, never = (adapter(done.home, f) for f in (TWICE_TWO.folder, "sft-float32-2-512"))
    assert all(torch.equal(resumed[name], never[name]) for name in never)


def test_a_loss_that_is_not_finite_in_one_process_stops_all(done: Done) -> None:
    first, second = done.outcomes[NOT_FINITE]
    assert "loss of step 2 is not finite" in second.message
    assert "sft.jsonl, row" in second.message
    assert not second.told
    assert first.told
    assert first.message == second.message
    # The step was not applied anywhere.
    for rank in (0, 1):
        norms = (done.home / f"{NOT_FINITE.folder}.rank{rank}" / "norms.txt").read_text()
        assert len(norms.split()) == 1


def test_an_error_anywhere_is_said_once_and_ends_all(done: Done) -> None:
    first, second = done.outcomes[BUG]
    assert (second.error, first.code, first.told) == ("ZeroDivisionError", 1, True)
    for order, words in (
        (MISTAKE, "'wq' fits no module"),
        (LOCKED, "is in use by another tandem process"),
        (OTHER_DATA, "the data of process 1"),
    ):
        outcomes = done.outcomes[order]
        assert all(words in outcome.message for outcome in outcomes)
        assert [outcome.code for outcome in outcomes] == [2, 2]
        assert [outcome.told for outcome in outcomes] == [False, True]
    assert not (done.home / OTHER_DATA.folder).exists()
