"""What finished stages leave for the next plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tandem.plan import history, rate
from tandem.plan.history import FIGURES, Measured, Setting, recall, remember

HERE = Setting("sft", "cpu", "float32", 1_000_000, 1, "single")


def _measured(seconds: float = 2.0, **setting: object) -> Measured:
    estimated = dict.fromkeys(FIGURES, 4.0)
    return Measured(
        replace(HERE, **setting),  # type: ignore[arg-type]
        1e9,
        estimated,
        {**estimated, "seconds": seconds, "memory": 3.0},
    )


def test_a_run_is_found_again_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "estimates.jsonl"
    assert recall(HERE, path) is None
    remember(_measured(), path)
    found = recall(HERE, path)
    assert found == _measured()
    assert found.rate == 5e8
    assert found.ratios == {"tokens": 1.0, "steps": 1.0, "memory": 0.75, "seconds": 0.5}


def test_the_most_alike_counts_and_of_equals_the_last(tmp_path: Path) -> None:
    path = tmp_path / "estimates.jsonl"
    for one in (
        _measured(1.0),
        _measured(2.0),
        _measured(3.0, stage="dpo"),
        _measured(4.0, processes=2, engine="ddp"),
        _measured(5.0, size=64_000_000),
        _measured(6.0, dtype="bfloat16"),
        _measured(7.0, device="cuda"),
        _measured(20.0, size=16_000_000, stage="dpo"),
        _measured(8.0, size=16_000_000),
    ):
        remember(one, path)

    def seconds(**setting: object) -> float | None:
        found = recall(replace(HERE, **setting), path)  # type: ignore[arg-type]
        return None if found is None else found.actual["seconds"]

    assert seconds() == 2.0
    assert seconds(stage="dpo") == 3.0
    assert seconds(processes=2, engine="ddp", stage="dpo") == 4.0
    assert seconds(size=1_100_000) == 2.0
    assert seconds(size=50_000_000, stage="dpo") == 5.0
    # A longer one of another stage says more than a brief one of the same.
    assert seconds(size=16_000_000) == 20.0
    assert seconds(dtype="bfloat16", stage="dpo") == 6.0
    assert seconds(device="hpu") is None


def test_a_model_of_quite_another_size_says_nothing(tmp_path: Path) -> None:
    """The nearest of them neither."""
    path = tmp_path / "estimates.jsonl"
    remember(_measured(50_000.0, size=7_241_732_096), path)
    assert recall(replace(HERE, size=260_000), path) is None
    assert recall(replace(HERE, size=1_100_000_000), path) is None
    assert recall(replace(HERE, size=28_000_000_000), path) == _measured(
        50_000.0, size=7_241_732_096
    )
    remember(_measured(2.0, size=100_000), path)
    found = recall(replace(HERE, size=260_000), path)
    assert found is not None
    assert found.actual["seconds"] == 2.0


def test_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "estimates.jsonl"
    path.write_text('{"setting": 3}\nnonsense\n[]\n{"operations": "x"}\n')
    assert recall(HERE, path) is None
    remember(_measured(), path)
    assert recall(HERE, path) == _measured()
    path.write_bytes(b"\xff\xfe")
    assert recall(HERE, path) is None


def test_the_record_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_KEPT", 3)
    path = tmp_path / "estimates.jsonl"
    for seconds in range(1, 9):
        remember(_measured(float(seconds)), path)
        assert len(path.read_text().splitlines()) <= 6
    found = recall(HERE, path)
    assert found is not None
    assert found.actual["seconds"] == 8.0


def test_the_rate_is_the_last_runs_or_a_timed_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rate, "timed_product", lambda *_: 1e10)

    assert rate.recorded_rate(HERE) is None
    first = rate.product_rate(torch.device("cpu"), torch.float32, lambda: None)
    assert (first.operations, first.measured) == (5e9, None)
    assert "a timed matrix product" in first.source
    remember(_measured(processes=2))
    then = rate.recorded_rate(HERE)
    assert then is not None
    assert then.operations == 2.5e8  # of each of two processes
    assert "the last sft run" in then.source


def test_a_product_is_timed_without_touching_random_state() -> None:
    before = torch.get_rng_state()
    found = rate.timed_product(torch.device("cpu"), torch.float32, lambda: None)
    assert 1e7 < found < 1e15
    assert torch.equal(torch.get_rng_state(), before)
