"""What a training stage will take, estimated before it begins, and compared when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.data.order import Part
from tandem.data.trees import Trees
from tandem.estimate.history import FIGURES, Measured, Setting, remember
from tandem.estimate.memory import Held, Memory, memory_of
from tandem.estimate.operations import Operations, count_operations
from tandem.estimate.rate import Rate, rate_here
from tandem.estimate.shape import ModelShape, shape_of
from tandem.estimate.work import Asked, Work, count_work
from tandem.model.attention import is_padded
from tandem.model.head import block_bytes
from tandem.recipe.training import Training
from tandem.train.device import Device, activation_bytes, attention_weight
from tandem.train.engine import Engine


@dataclass(frozen=True)
class Forecast:
    """Estimates of one stage.

    Attributes:
        setting: where it runs, and of what size it is.
        work, operations, memory: see `estimate`.
        rate: what time follows from.
        seconds, reference_seconds: of training, and of DPO's pass before it.
    """

    setting: Setting
    work: Work
    operations: Operations
    memory: Memory
    rate: Rate
    seconds: float
    reference_seconds: float


def forecast(
    shape: ModelShape,
    work: Work,
    settings: Training,
    setting: Setting,
    *,
    device: Device,
    held: Held,
) -> Forecast:
    """The estimates that follow from a model's shape and the work.

    Args:
        shape: of the model with its adapter.
        work: what is fed.
        settings: of the stage.
        setting: where it runs.
        device: of this machine, which is timed if no run has said how fast it is.
        held: how memory is used.
    """
    operations = count_operations(
        shape,
        work,
        reference=setting.stage == "dpo",
        checkpointing=settings.gradient_checkpointing,
    )
    rate = rate_here(setting, device.torch_device, device.weights, device.synchronize)
    # On CPU processes share the machine that was timed.
    together = rate.operations * (setting.processes if not device.is_host else 1)
    before = together
    if rate.measured is not None:
        if device.is_host:
            together = before = rate.measured.rate
        if rate.measured.reference_seconds > 0:
            before = rate.measured.reference_operations / rate.measured.reference_seconds
    return Forecast(
        setting,
        work,
        operations,
        memory_of(shape, held, setting.engine, setting.processes),
        rate,
        operations.training * work.imbalance / together,
        operations.reference / before,
    )


def asked_of(
    settings: Training,
    *,
    seed: int,
    budget: int,
    processes: int,
    config: Any,
    padded: bool,
    parts: tuple[Part, ...] = (),
) -> Asked:
    """How a stage goes through its records."""
    return Asked(
        settings.batch_size,
        settings.epochs,
        settings.max_steps,
        seed,
        budget,
        processes,
        attention_weight(config),
        padded,
        parts,
    )


def held_by(
    settings: Training,
    work: Work,
    *,
    device: Device,
    config: Any,
    quantization: str | None,
    copies: int,
    baseline: int,
) -> Held:
    """How a process of a stage on this kind of device uses memory.

    Args:
        settings: of the stage.
        work: what it feeds.
        device: where.
        config: the model's configuration.
        quantization: of the base.
        copies: bytes of copies of the weights in a faster order.
        baseline: what the process holds without a model.
    """
    width = device.weights.itemsize
    vocabulary = int(config.get_text_config().vocab_size)
    return Held(
        weight_bytes=width,
        quantized=quantization is not None,
        copies=copies,
        checkpointing=settings.gradient_checkpointing,
        tokens=work.largest,
        activation_bytes=activation_bytes(config) * width / 4,
        head_bytes=min(block_bytes(device.kind), work.largest * vocabulary * 4),
        baseline=baseline,
    )


def forecast_run(
    name: str,
    trees: Trees,
    model: Any,
    settings: Training,
    *,
    engine: Engine,
    config: Any,
    schedule: Mapping[str, Any],
    parts: tuple[Part, ...],
    quantization: str | None,
    seed: int,
    baseline: int,
) -> Forecast:
    """The estimates of a run that is about to begin, with its model loaded and adapted.

    Args:
        name: sft or dpo.
        trees, model, settings, engine, config, parts, quantization, seed: the run's.
        schedule: resolved.
        baseline: what the process held before the model was loaded.
    """
    device, processes = engine.device, engine.processes.count
    shape = shape_of(model)
    asked = asked_of(
        settings,
        seed=seed,
        budget=schedule["tokens_per_microbatch"],
        processes=processes,
        config=config,
        padded=is_padded(model),
        parts=parts,
    )
    work = count_work(trees, asked)
    setting = Setting(
        name, device.kind, device.dtype_name, shape.parameters, processes, schedule["engine"]
    )
    held = held_by(
        settings,
        work,
        device=device,
        config=config,
        quantization=quantization,
        copies=ordered_bytes(shape) if schedule["ordered_weights"] else 0,
        baseline=baseline,
    )
    return forecast(shape, work, settings, setting, device=device, held=held)


def ordered_bytes(shape: ModelShape) -> int:
    """What copies of the frozen weights in oneDNN's order take, see `model.products`."""
    return 2 * 4 * (shape.in_linear + shape.head)


def compared(made: Forecast, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Estimates against what a finished stage's summary says, for that summary."""
    estimated = {
        "tokens": made.work.tokens,
        "steps": made.work.steps,
        "memory": made.memory.peak,
        "seconds": made.seconds,
    }
    actual = {
        "tokens": summary["tokens"],
        "steps": summary["steps"],
        "memory": summary["peak_memory_bytes"],
        "seconds": summary["train_seconds"],
    }
    return {
        "rate_from": made.rate.source,
        **{name: {"estimated": estimated[name], "actual": actual[name]} for name in FIGURES},
    }


def keep(made: Forecast, comparison: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Remember a finished stage for the next plan; raises OSError where that cannot be."""
    figures = {name: comparison[name] for name in FIGURES}
    whole = summary["reference_computed"] == made.work.records
    remember(
        Measured(
            made.setting,
            made.operations.training,
            {name: figure["estimated"] for name, figure in figures.items()},
            {name: figure["actual"] for name, figure in figures.items()},
            made.operations.reference if whole else 0.0,
            summary["reference_seconds"] if whole else 0.0,
        )
    )
