"""What finished stages leave for the next plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tandem.integrations.choose import choose_device
from tandem.plan import rate
from tandem.plan.rate import FIGURES, Measured, RateKey, recorded_rate, remember

HERE = RateKey("sft", "cpu", "float32", 1_000_000, 1, "single")


def _measured(seconds: float = 2.0, **setting: object) -> Measured:
    estimated = dict.fromkeys(FIGURES, 4.0)
    return Measured(
        replace(HERE, **setting),  # type: ignore[arg-type]
        1e9,
        estimated,
        {**estimated, "seconds": seconds, "memory": 3.0},
    )


def _recall(key: RateKey, path: Path) -> Measured | None:
    found = recorded_rate(key, path)
    return None if found is None else found.last_run


def test_a_run_is_found_again_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "estimates.jsonl"
    assert _recall(HERE, path) is None
    remember(_measured(), path)
    found = _recall(HERE, path)
    assert found == _measured()
    assert found.rate == 5e8
    assert found.ratios == {"tokens": 1.0, "steps": 1.0, "memory": 0.75, "seconds": 0.5}


def test_the_last_run_that_is_alike_counts(tmp_path: Path) -> None:
    path = tmp_path / "estimates.jsonl"
    for one in (
        _measured(1.0),
        _measured(2.0, stage="dpo"),
        _measured(3.0, size=16_000_000),
        _measured(4.0, processes=2, engine="ddp"),
        _measured(5.0, processes=2, engine="fsdp2"),
        _measured(6.0, dtype="bfloat16"),
        _measured(7.0, device="cuda"),
    ):
        remember(one, path)

    def seconds(**setting: object) -> float | None:
        found = _recall(replace(HERE, **setting), path)  # type: ignore[arg-type]
        return None if found is None else found.actual["seconds"]

    assert seconds() == seconds(stage="dpo") == 2.0
    assert seconds(size=4_000_000) == seconds(size=64_000_000) == 3.0
    assert seconds(size=250_000) == 2.0
    assert seconds(size=249_000) is seconds(size=65_000_000) is None
    assert seconds(processes=2, engine="ddp") == 4.0
    assert seconds(processes=3, engine="ddp") is seconds(device="hpu") is None
    assert seconds(dtype="bfloat16") == 6.0


def test_a_model_of_quite_another_size_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "estimates.jsonl"
    remember(_measured(2.0, size=100_000), path)
    remember(_measured(50_000.0, size=7_241_732_096), path)
    assert _recall(replace(HERE, size=1_100_000_000), path) is None
    assert _recall(replace(HERE, size=28_000_000_000), path) == _measured(
        50_000.0, size=7_241_732_096
    )
    found = _recall(replace(HERE, size=260_000), path)
    assert found is not None
    assert found.actual["seconds"] == 2.0


def test_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "estimates.jsonl"
    path.write_text('{"setting": 3}\nnonsense\n[]\n{"operations": "x"}\n')
    assert _recall(HERE, path) is None
    remember(_measured(), path)
    with path.open("a") as file:
        file.write('{"setting": 3}\nnonsense\n')
    assert _recall(HERE, path) == _measured()
    path.write_bytes(b"\xff\xfe")
    assert _recall(HERE, path) is None


def test_the_record_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "_KEPT", 3)
    path = tmp_path / "estimates.jsonl"
    for seconds in range(1, 9):
        remember(_measured(float(seconds)), path)
        assert len(path.read_text().splitlines()) <= 6
    found = _recall(HERE, path)
    assert found is not None
    assert found.actual["seconds"] == 8.0


def test_the_rate_is_the_last_runs_or_a_timed_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rate, "timed_product", lambda *_: 1e10)

    assert rate.recorded_rate(HERE) is None
    first = rate.product_rate(choose_device("cpu", "float32"))
    assert (first.operations, first.last_run) == (5e9, None)
    assert "a timed matrix product" in first.source
    remember(_measured(processes=2))
    then = rate.recorded_rate(replace(HERE, processes=2))
    assert then is not None
    assert then.operations == 2.5e8  # of each of two processes
    assert "the last sft run" in then.source


def test_a_product_is_timed_without_touching_random_state() -> None:
    before = torch.get_rng_state()
    found = rate.timed_product(choose_device("cpu", "float32"))
    assert 1e7 < found < 1e15
    assert torch.equal(torch.get_rng_state(), before)
