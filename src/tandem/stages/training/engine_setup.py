"""Where a training stage computes: its device, its processes and how they share the work."""

from __future__ import annotations

from tandem.integrations.choose_engine import choose_strategy
from tandem.integrations.deepspeed.ds_config import Settled
from tandem.model.elementwise import check_compile
from tandem.model.quantize import check_quantization
from tandem.recipe.run_settings import Runtime
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.device import Device, exact_float32
from tandem.runtime.process_group import ProcessGroup
from tandem.train.engines.engine import Engine


def start_engine(
    device: Device, processes: ProcessGroup, settings: TrainingSettings, runtime: Runtime
) -> Engine:
    """The engine that a recipe asks for, which holds no model yet.

    Raises UserError for what does not exist here, does not fit the number of processes, or does
    not go together.
    """
    exact_float32()
    strategy = choose_strategy(
        runtime.engine,
        device=device.kind,
        processes=processes.count,
        settled=_settled(settings, device, processes.count),
    )
    check_quantization(runtime.quantization, device=device.kind, sharded=strategy.sharded)
    check_compile(runtime.compile, device=device.kind, sharded=strategy.sharded)
    return Engine(device, processes, strategy)


def in_words(engine: Engine) -> str:
    """Where a run computes."""
    count, kind = engine.processes.count, engine.device.kind
    place = f"{count} processes on {kind}" if count > 1 else kind
    return place if engine.strategy.name == "single" else f"{place} ({engine.strategy.name})"


def _settled(settings: TrainingSettings, device: Device, processes: int) -> Settled:
    return Settled(
        batch_size=settings.batch_size,
        processes=processes,
        max_grad_norm=settings.max_grad_norm,
        dtype=device.dtype_name,
        learning_rate=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        scheduler=settings.lr_scheduler,
        warmup_steps=settings.warmup_steps,
        max_steps=settings.max_steps,
    )
