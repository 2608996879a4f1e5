"""Held-out scores, the best adapter and training beside them are the same under every engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tandem.storage.atomic_files import read_json, read_jsonl

from .orders import BASE, ENGINES, KINDS, LIMITS, Done, Order, adapter, distance, started, whole

SCORED = [
    Order(kind, f"{kind}-{engine}", budget=300, engine=engine, keep="best")
    for engine, kind in zip(ENGINES, (*KINDS, *KINDS), strict=True)
]
ALONE = [Order(kind, f"{kind}-alone", keep="last") for kind in KINDS]
# Stopped after one of three steps in two processes, finished by one.
MOVED = Order("sft", "moved", budget=300, engine="fsdp2", keep="best", trouble="SIGTERM")
AFTER = replace(MOVED, engine="single", trouble="")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """All orders of this module."""
    done = started(tmp_path_factory.mktemp("held-out"))
    done.alone([order for order in BASE if order.dtype == "float32"])
    done.alone(ALONE)
    done.launched(2, [*SCORED, MOVED])
    done.alone([AFTER])
    return done


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_changes_no_bit_of_training(done: Done, kind: str) -> None:
    scored, plain = (adapter(done.home, f"{kind}-{name}") for name in ("alone", "float32-whole"))
    assert all(torch.equal(scored[name], plain[name]) for name in plain)


@pytest.mark.parametrize("order", [*SCORED, AFTER], ids=lambda order: order.folder)
def test_every_engine_scores_the_same(done: Done, order: Order) -> None:
    assert [outcome.message for outcome in done.outcomes[order]] == [""] * len(done.outcomes[order])
    parameters = [adapter(done.home, folder) for folder in (order.folder, whole(order))]
    assert distance(*parameters) < LIMITS["float32"][1]
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
