"""What comes from outside, each in a dozen lines: losses, optimizers, schedules, callbacks, changes
to a model, engines and devices. Kinds of trained weights: `stages/test_trained_weights.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from tandem.errors import Stopped
from tandem.losses.answers import AnswerLogps
from tandem.losses.registry import PREFERENCE_LOSSES, preference_loss
from tandem.model.prepare_model import FOR_TRAINING, Preparation
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.training_settings import LoraSettings, SftSettings
from tandem.runtime.device import Device
from tandem.stages.dpo import run_dpo
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json, read_jsonl
from tandem.train.callbacks.callback import Callback, StepReport, TrainingRun
from tandem.train.engines.engine import Engine, MakeOptimizer
from tandem.train.optimizers import OPTIMIZERS, OptimizerSpec
from tandem.train.schedules import LR_SCHEDULES, make_schedule

from ..jobs import training_job
from ..stages.made_inputs import make_conversations, make_model_folder, make_pairs

QUIET = Console(quiet=True)
COMMON: dict[str, Any] = {
    "batch_size": 4, "max_steps": 6, "max_length": 128, "learning_rate": 1e-3,
    "logging_steps": 1, "save_steps": 2, "lora": LoraSettings(rank=2, alpha=4),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("seams") / "model")


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    found, wanted = adapter(a), adapter(b)
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture(autouse=True)
def _losses_of_before() -> Iterator[None]:
    before = dict(PREFERENCE_LOSSES)
    yield
    PREFERENCE_LOSSES.clear()
    PREFERENCE_LOSSES.update(before)


def test_a_loss_from_outside_trains(model: Path, tmp_path: Path) -> None:
    @preference_loss("squared", reference=True)
    def squared(chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float) -> Tensor:
        return (1 - beta * (chosen.ratio - rejected.ratio)) ** 2

    pairs = DataSource(path=str(make_pairs(tmp_path / "pairs.jsonl", 12)))
    settings = DpoSettings(loss="squared", data=(pairs,), **COMMON)
    folder = run_dpo(training_job(settings, model, tmp_path / "dpo"), QUIET)
    lines = read_jsonl(folder / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(1.0, abs=1e-6)
    assert lines[-1]["loss"] < 0.999
    assert lines[-1]["rewards/margins"] > 0.001


def test_a_loss_of_the_whole_step_does_not_depend_on_micro_batches(
    model: Path, tmp_path: Path
) -> None:
    """It needs no reference, and its statistic is of all pairs of a step."""

    def mean_margin(chosen: AnswerLogps, rejected: AnswerLogps) -> Tensor:
        return (chosen.mean - rejected.mean).mean()

    @preference_loss("closest", reference=False, statistic=mean_margin, reward="mean")
    def closest(chosen: AnswerLogps, rejected: AnswerLogps, mean: Tensor, *, beta: float) -> Tensor:
        return (chosen.mean - rejected.mean - mean - beta) ** 2

    pairs = DataSource(path=str(make_pairs(tmp_path / "pairs.jsonl", 12)))
    settings = DpoSettings(loss="closest", data=(pairs,), **COMMON)
    for budget in (4096, 40):
        folder = tmp_path / str(budget)
        run_dpo(training_job(settings, model, folder, tokens_per_microbatch=budget), QUIET)
    whole, fine = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("4096", "40"))
    for a, b in zip(whole, fine, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], rel=1e-4)
    summaries = [read_json(tmp_path / name / "summary.json") for name in ("4096", "40")]
    assert summaries[0]["micro_batches"] < summaries[1]["micro_batches"]
    assert summaries[0]["reference_computed"] == 0


class SignSgd(torch.optim.Optimizer):
    """Steps by the sign of a running mean: one tensor of state for each parameter."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                    mean.lerp_(parameter.grad, 0.1)
                    parameter.sub_(mean.sign(), alpha=group["lr"])


class Signed(SftSettings):
    optimizer: Literal["sign"] = "sign"  # type: ignore[assignment]


class StopAfter(Callback):
    """A callback from outside: notes what it is told, and asks to stop after a step."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step
        self.told: list[tuple[str, int]] = []

    def on_train_begin(self, run: TrainingRun) -> None:
        self.told.append(("begin", run.state.step))

    def on_step_end(self, run: TrainingRun, report: StepReport) -> None:
        if report.metrics:
            self.told.append(("step", int(report.metrics["step"])))
        if run.state.step == self.step:
            run.ask_to_stop("enough for today")

    def on_evaluate(self, run: TrainingRun, scores: Mapping[str, float]) -> None:
        self.told.append(("scores", int(scores["step"])))

    def on_checkpoint(self, run: TrainingRun) -> None:
        self.told.append(("checkpoint", run.state.step))

    def on_train_end(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        summary["told"] = len(self.told)


def test_an_optimizer_from_outside_trains_and_resumes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = OptimizerSpec(SignSgd, lambda settings: {"lr": settings.learning_rate}, state_tensors=1)
    monkeypatch.setitem(OPTIMIZERS, "sign", spec)
    talks = DataSource(path=str(make_conversations(tmp_path / "talks.jsonl", 12)))
    settings = Signed(data=(talks,), **(COMMON | {"batch_size": 12, "learning_rate": 3e-3}))
    whole = run_sft(training_job(settings, model, tmp_path / "whole"), QUIET)
    stopped = training_job(settings, model, tmp_path / "stopped")
    with pytest.raises(Stopped, match="stopped after step 3 of 6: enough for today; a checkpoint"):
        run_sft(stopped, QUIET, [StopAfter(3)])
    state = load_file(
        tmp_path / "stopped" / "checkpoints" / "step-000003" / "optimizer.safetensors"
    )
    assert {name.rsplit("|", 1)[1] for name in state} == {"mean"}
    assert same(run_sft(stopped, QUIET), whole)
    lines = read_jsonl(whole / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_callback_from_outside_is_told_and_adds_to_the_summary(
    model: Path, tmp_path: Path
) -> None:
    talks = DataSource(path=str(make_conversations(tmp_path / "talks.jsonl", 12)))
    settings = SftSettings(
        data=(talks,),
        validation={"fraction": 0.2, "steps": 3},
        **COMMON,  # type: ignore[arg-type]
    )
    callback = StopAfter()
    folder = run_sft(training_job(settings, model, tmp_path / "out"), QUIET, [callback])
    assert callback.told == [
        ("scores", 0), ("begin", 0), ("step", 1), ("step", 2), ("checkpoint", 2), ("scores", 3),
        ("step", 3), ("step", 4), ("checkpoint", 4), ("step", 5), ("scores", 6), ("step", 6),
        ("checkpoint", 6),
    ]  # fmt: skip
    assert read_json(folder / "summary.json")["told"] == len(callback.told)


def _sft(model: Path, folder: Path) -> Path:
    talks = DataSource(path=str(make_conversations(folder.parent / "talks.jsonl", 12)))
    return run_sft(training_job(SftSettings(data=(talks,), **COMMON), model, folder), QUIET)


def test_a_change_to_a_model_from_outside_takes_its_place_in_the_list(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def freeze_a(model: Any, _: Preparation, log: Any) -> Any:
        """Train B alone (LoRA-FA, arXiv 2308.03303)."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)
        log("A is frozen")
        return model

    changes = "tandem.stages.training.model_setup.FOR_TRAINING"
    monkeypatch.setattr(changes, (*FOR_TRAINING, freeze_a))
    folder = _sft(model, tmp_path / "out")
    assert all("lora_B" in name for name in adapter(folder))


class PlainEngine(Engine):
    """Keeps gradients where torch puts them, for one process."""

    name = "plain"

    def _share(self, make_optimizer: MakeOptimizer) -> None:
        self.optimizer = make_optimizer(self.parameters)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()


def test_an_engine_from_outside_trains_the_same_adapter(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = _sft(model, tmp_path / "ours")
    monkeypatch.setattr(
        "tandem.stages.training.execution.choose_engine",
        lambda _name, device, processes, _settings: PlainEngine(device, processes),
    )
    theirs = _sft(model, tmp_path / "theirs")
    assert same(theirs, ours)
    assert read_json(theirs / "summary.json")["engine"] == "plain"


@dataclass(frozen=True)
class CarefulDevice(Device):
    """A CPU with an optimizer, an attention, a budget and graphs of its own."""

    boundaries: list[int] = field(default_factory=list)

    def attention(self, requested: str, model: Any) -> tuple[str, str]:
        return "dense", f"not {requested}"

    def optimizer(self, name: str) -> type[torch.optim.Optimizer] | None:
        return torch.optim.NAdam if name == "adamw" else None

    def batch_shapes(self, request: Any) -> tuple[None, int]:
        return None, 64

    def step_boundary(self) -> None:
        self.boundaries.append(1)


def test_a_device_from_outside_trains_in_its_own_way(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = _sft(model, tmp_path / "ours")
    device = CarefulDevice(torch.device("cpu"), torch.float32)
    monkeypatch.setattr("tandem.stages.training.train_stage.device_of", lambda _: device)
    folder = _sft(model, tmp_path / "theirs")
    summary, manifest = (read_json(folder / f"{name}.json") for name in ("summary", "manifest"))
    assert summary["attention"] == "dense"
    assert manifest["schedule"]["tokens_per_microbatch"] == 64
    assert len(device.boundaries) == summary["micro_batches"] + summary["steps"]
    assert not same(folder, ours)  # the optimizer is another one


def test_a_schedule_from_outside_is_a_function_of_where_a_step_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stairs(SftSettings):
        lr_scheduler: Literal["stairs"] = "stairs"

    monkeypatch.setitem(LR_SCHEDULES, "stairs", lambda at, _: 1.0 if at.left > 0.5 else 0.5)
    settings = Stairs(data=(DataSource(path="x"),), learning_rate=2.0, warmup_steps=2)
    rate = make_schedule(settings, 6)
    assert [rate(step) for step in range(6)] == [0.0, 1.0, 2.0, 2.0, 1.0, 1.0]
