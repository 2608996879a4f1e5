"""What a training stage will take, estimated before it begins, and compared when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.data.batching.sampler import WeightedSource
from tandem.data.encoded.dataset import EncodedDataset
from tandem.model.attention.select import is_padded
from tandem.model.cpu.onednn_linear import ordered_bytes
from tandem.model.logprobs.output_head import block_bytes
from tandem.plan.history import FIGURES, Measured, Setting, remember
from tandem.plan.memory_estimate import Held, Memory, memory_of
from tandem.plan.model_shape import ModelShape, shape_of
from tandem.plan.rate import Rate, recorded_rate
from tandem.plan.workload import Asked, Operations, Work, count_operations, count_work
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.device import Device
from tandem.train.engines.engine import Engine
from tandem.train.token_budget import activation_bytes, attention_weight


@dataclass(frozen=True)
class Forecast:
    """Estimates of one stage.

    Attributes:
        setting: where it runs, and of what size it is.
        work, operations, memory: see `estimate`.
        rate: what time follows from; None where nobody knows.
        seconds, reference_seconds: of training, and of DPO's pass before it; None without a rate.
    """

    setting: Setting
    work: Work
    operations: Operations
    memory: Memory
    rate: Rate | None
    seconds: float | None
    reference_seconds: float | None


def forecast(
    shape: ModelShape,
    work: Work,
    settings: TrainingSettings,
    setting: Setting,
    *,
    host: bool,
    held: Held,
    rate: Rate | None,
) -> Forecast:
    """The estimates that follow from a model's shape and the work.

    Args:
        shape: of the model with its adapter.
        work: what is fed.
        settings: of the stage.
        setting: where it runs.
        host: whether processes share the machine's processor.
        held: how memory is used.
        rate: of one process, if it is known.
    """
    operations = count_operations(
        shape,
        work,
        reference=setting.stage == "dpo",
        checkpointing=settings.gradient_checkpointing,
    )
    memory = memory_of(shape, held, setting.engine, setting.processes)
    if rate is None:
        return Forecast(setting, work, operations, memory, None, None, None)
    # On CPU processes share the machine that was timed.
    together = rate.operations * (setting.processes if not host else 1)
    before = together
    if rate.measured is not None and not rate.basis:
        if host:
            together = before = rate.measured.rate
        if rate.measured.reference_seconds > 0:
            before = rate.measured.reference_operations / rate.measured.reference_seconds
    return Forecast(
        setting,
        work,
        operations,
        memory,
        rate,
        operations.training * work.imbalance / together,
        operations.reference / before,
    )


def asked_of(
    settings: TrainingSettings,
    *,
    seed: int,
    budget: int,
    processes: int,
    config: Any,
    padded: bool,
    parts: tuple[WeightedSource, ...] = (),
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
    settings: TrainingSettings,
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
    dataset: EncodedDataset,
    model: Any,
    settings: TrainingSettings,
    *,
    engine: Engine,
    config: Any,
    schedule: Mapping[str, Any],
    parts: tuple[WeightedSource, ...],
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
    work = count_work(dataset, asked)
    setting = Setting(
        name, device.kind, device.dtype_name, shape.parameters, processes, schedule["engine"]
    )
    held = held_by(
        settings,
        work,
        device=device,
        config=config,
        quantization=quantization,
        copies=ordered_bytes(model),
        baseline=baseline,
    )
    # Nothing is timed here, where other processes wait.
    rate = recorded_rate(setting)
    return forecast(shape, work, settings, setting, host=device.is_host, held=held, rate=rate)


def copied_bytes(shape: ModelShape, *, quantized: bool) -> int:
    """What `model.products.ordered_bytes` will find in a model; 4-bit layers have no copies."""
    return 2 * 4 * (shape.head + (0 if quantized else shape.plain))


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
        "rate_from": None if made.rate is None else made.rate.source,
        **{name: {"estimated": estimated[name], "actual": actual[name]} for name in FIGURES},
    }


def keep(made: Forecast, comparison: Mapping[str, Any], summary: Mapping[str, Any]) -> None:
    """Remember a finished stage for the next plan; raises OSError where that cannot be."""
    figures = {name: comparison[name] for name in FIGURES}
    whole = summary["reference_computed"] == made.work.records
    remember(
        Measured(
            made.setting,
            made.operations.training * made.work.imbalance,
            {
                name: figure["estimated"]
                for name, figure in figures.items()
                if figure["estimated"] is not None
            },
            {name: figure["actual"] for name, figure in figures.items()},
            made.operations.reference if whole else 0.0,
            summary["reference_seconds"] if whole else 0.0,
        )
    )
