"""An average of the weights as a stage's result: saved, scored and kept in their place, while the
steps go on from the weights themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from tandem.errors import Stopped
from tandem.model.load_model import load_adapter, load_model
from tandem.recipe.unmeant import unmeant
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json
from tandem.train.callbacks.callback import Callback, StepReport, TrainingRun
from tandem.train.engines.engine import Engine

from ..jobs import training_job
from .made_inputs import make_conversations
from .test_training_stages import run, settings
from .test_validation import WILD, encoded, lines, logps, own_data, same, unlike

WAYS: dict[str, dict[str, Any]] = {
    "schedule_free": {
        "optimizer": "schedule_free_adamw", "lr_scheduler": "constant", "weight_decay": 0.01,
    },
    "ema": {"ema_decay": 0.6, "lr_scheduler": "constant"},
}  # fmt: skip
QUIET = Console(quiet=True)


class Watch(Callback):
    """Notes what the engine moves and what would become of the run after each step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.moved: list[dict[str, Tensor]] = []
        self.result: list[dict[str, Tensor]] = []

    def on_step_end(self, run: TrainingRun, report: StepReport) -> None:
        parameters = run.engine.parameters.items()
        self.moved.append({n: p.detach().clone() for n, p in parameters})
        self.result.append({n: p.clone() for n, p in run.engine.trained().items()})
        if run.state.step == self.stop_after:
            run.ask_to_stop("enough")


class Start(Callback):
    """Notes the weights before the first step."""

    def on_train_begin(self, run: TrainingRun) -> None:
        self.weights = {n: p.detach().clone() for n, p in run.engine.parameters.items()}


def watched(
    model: Path, folder: Path, watch: Watch, *more: Callback, **changes: Any
) -> dict[str, Tensor]:
    data = folder.parent / "sft.jsonl"
    if not data.exists():
        make_conversations(data)
    run_sft(training_job(settings("sft", data, **changes), model, folder), QUIET, [watch, *more])
    return load_file(folder / "adapter_model.safetensors")


def values(tensors: dict[str, Tensor]) -> list[Tensor]:
    """In one order, whatever the names are."""
    named = {name.replace(".default", ""): tensor for name, tensor in tensors.items()}
    return [named[name] for name in sorted(named)]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))


def test_a_moving_average_is_the_plain_sum(tiny_model: Path, tmp_path: Path) -> None:
    """0.6^n of the start, and 0.4 x 0.6^k of the weights k steps before the last, in float64."""
    watch, start = Watch(), Start()
    saved = watched(tiny_model, tmp_path / "out", watch, start, **WAYS["ema"])
    steps = [values(start.weights), *map(values, watch.moved)]
    shares = [0.6**4, *(0.4 * 0.6 ** (4 - step) for step in range(1, 5))]
    for number, found in enumerate(values(saved)):
        parts = zip(shares, steps, strict=True)
        wanted = sum(share * step[number].double() for share, step in parts)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-8)
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("way", WAYS)
def test_the_average_is_saved_and_the_steps_go_on_from_the_weights(
    way: str, tiny_model: Path, tmp_path: Path
) -> None:
    watch = Watch()
    saved = watched(tiny_model, tmp_path / "out", watch, **WAYS[way])
    assert equal(saved, watch.result[-1])
    assert not equal(saved, watch.moved[-1])
    at_two = tmp_path / "out" / "checkpoints" / "step-000002" / "adapter_model.safetensors"
    assert equal(load_file(at_two), watch.result[1])


@pytest.mark.parametrize("way", WAYS)
def test_held_out_scores_are_the_averages_by_plain_float64(
    way: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = own_data("sft", tmp_path / "v.jsonl")
    asked = {"validation": validation, "max_length": 200, **WAYS[way]}
    run("sft", tiny_model, tmp_path / "out", **asked)
    base = load_model(tiny_model, dtype=torch.float64, device=torch.device("cpu"))
    model = load_adapter(base, tmp_path / "out")
    rows = encoded("sft", tmp_path / "v.jsonl", tmp_path / "out")
    policy = [logps(model, *row) for row in rows]
    wanted = -sum(p for p, _ in policy) / sum(count for _, count in policy)
    assert lines(tmp_path / "out")[-1]["eval_loss"] == pytest.approx(wanted, rel=2e-6)

    @contextmanager
    def as_they_move(_: Engine) -> Iterator[None]:
        yield

    monkeypatch.setattr(Engine, "result_in_place", as_they_move)
    run("sft", tiny_model, tmp_path / "other", **asked)
    found = lines(tmp_path / "other")[-1]["eval_loss"]
    assert found != pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_scoring_and_a_stop_change_no_bit(way: str, tiny_model: Path, tmp_path: Path) -> None:
    """A checkpoint after every second step, a stop after the third."""
    plain = watched(tiny_model, tmp_path / "plain", Watch(), max_steps=6, **WAYS[way])
    held = own_data("sft", tmp_path / "v.jsonl")
    asked: dict[str, Any] = {"max_steps": 6, "validation": held, **WAYS[way]}
    assert same(watched(tiny_model, tmp_path / "scored", Watch(), **asked), plain)
    first, second = Watch(stop_after=3), Watch()
    with pytest.raises(Stopped):
        watched(tiny_model, tmp_path / "stopped", first, **asked)
    assert same(watched(tiny_model, tmp_path / "stopped", second, **asked), plain)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "scored")
    assert (len(first.moved), len(second.moved)) == (3, 3)


@pytest.mark.parametrize("way", WAYS)
def test_the_best_of_the_averages_may_be_kept(way: str, tiny_model: Path, tmp_path: Path) -> None:
    watch = Watch()
    asked: dict[str, Any] = WILD | {"validation": unlike(tmp_path)} | WAYS[way]
    best = watched(tiny_model, tmp_path / "out", watch, **asked)
    scores = {line["step"]: line["eval_loss"] for line in lines(tmp_path / "out")}
    step = min(scores, key=lambda s: (scores[s], s))
    assert read_json(tmp_path / "out" / "summary.json")["kept_step"] == step
    assert 0 < step < 8
    assert equal(best, watch.result[step - 1])


def test_what_an_average_cannot_be_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with pytest.raises(ValidationError, match="ema_decay averages the weights, as optimizer: sch"):
        settings("sft", path, ema_decay=0.9, **WAYS["schedule_free"])
    asked = settings("sft", path, ema_decay=0.999)
    (said,) = unmeant(asked, steps=100, records=None)
    assert said == (
        "ema_decay 0.999: after the run's 100 steps the average is still 90% of the untrained "
        "weights; with 0.97 it is 5%"
    )
    assert unmeant(asked, steps=700, records=None) == []


def test_pairs_are_averaged_as_conversations_are(tiny_model: Path, tmp_path: Path) -> None:
    """The reference stays the untrained policy; the average gains less than the weights do."""
    gains = []
    for name, more in (("plain", {}), ("averaged", WAYS["ema"])):
        held = own_data("dpo", tmp_path / "v.jsonl")
        asked = {"lr_scheduler": "constant", "validation": held, **more}
        run("dpo", tiny_model, tmp_path / name, **asked)
        first, *_, last = lines(tmp_path / name)
        assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
        gains.append(last["eval_rewards/margins"])
    assert 0 < gains[1] < gains[0]
