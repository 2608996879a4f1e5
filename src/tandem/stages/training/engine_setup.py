"""Where a training stage computes: its device, its processes and how they share the work."""

from __future__ import annotations

from tandem.integrations.choose import choose_engine
from tandem.model.elementwise import check_compile
from tandem.model.quantize import check_quantization
from tandem.recipe.jobs import TrainingJob
from tandem.runtime.device import Device, exact_float32
from tandem.runtime.process_group import ProcessGroup
from tandem.train.engines.engine import Engine


def start_engine(device: Device, processes: ProcessGroup, job: TrainingJob) -> Engine:
    """Start the engine that a job asks for; it holds no model yet.

    Raises UserError for what does not exist here, does not fit the number of processes, or does
    not go together.
    """
    run = job.run
    exact_float32()
    engine = choose_engine(run.engine, device, processes, job.settings)
    check_quantization(run.quantization, device=device.kind, sharded=engine.sharded)
    check_compile(run.compile, device=device.kind, sharded=engine.sharded)
    return engine


def in_words(engine: Engine) -> str:
    """Say where a run computes."""
    count, kind = engine.processes.count, engine.device.kind
    place = f"{count} processes on {kind}" if count > 1 else kind
    return place if engine.name == "single" else f"{place} ({engine.name})"
