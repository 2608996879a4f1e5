"""The model that a stage trains: loaded, scheduled, with its adapter, compiled if asked for."""

from __future__ import annotations

from typing import Any

import torch

from tandem.data.batching.sampler import StepSampler
from tandem.data.encoded.dataset import EncodedDataset
from tandem.model.attention.select import choose_backend
from tandem.model.cpu.c_kernels import why_not
from tandem.model.cpu.onednn_linear import order_weights
from tandem.model.load_model import load_model, model_without_weights
from tandem.model.logprobs.output_head import order_head
from tandem.model.lora.adapter import adapted_weights
from tandem.model.lora.adapter_base import lasting_name
from tandem.model.prepare_model import adapted, warm_up
from tandem.model.torch_compile import Compiling, settle_compile_caches
from tandem.model.weight_files import check_sums
from tandem.runtime.device import BatchRequest
from tandem.stages.training.context import TrainContext
from tandem.stages.training.engine_setup import in_words
from tandem.stages.training.execution import repeat_schedule, resolve_schedule, token_budget_of
from tandem.stages.training.training_data import Records
from tandem.train.token_budget import TokenBudget


def set_up_model(
    context: TrainContext, records: Records, recorded: dict[str, Any]
) -> tuple[Any, dict[str, Any], TokenBudget]:
    """The base with its adapter, the schedule and the budget; says how it will compute."""
    engine, processes = context.engine, context.engine.processes
    device = engine.device
    base = processes.on_all(
        lambda: load_model(
            context.base,
            dtype=device.weights,
            # Whole models may not fit on a device; what is spread goes there in parts.
            device=torch.device("cpu") if engine.sharded else device.torch_device,
            quantization=context.job.run.quantization,
        )
    )
    attention = context.job.run.attention
    backend, why = processes.on_all(
        lambda: device.attention(attention, base) or choose_backend(attention, base)
    )
    schedule = _schedule(context, recorded, base, backend)
    _declare_shapes(context, records, schedule)
    torch.set_num_threads(schedule["threads"])
    budget = token_budget_of(engine, context.job.folder, schedule, context.log)
    context.log(
        f"{in_words(engine)}, {device.dtype_name}, attention {backend} ({why}), "
        f"{budget.tokens} tokens a micro-batch"
    )
    if context.job.run.quantization and device.is_host:
        context.log(
            "4-bit weights are unpacked at every use, which is slow on a CPU and made for "
            "memory that is short"
        )
    if device.is_host and (reason := why_not()):
        context.log(f"torch's own operators, no C kernels: {reason}")
    base_name, revision = lasting_name(context.job.run.model, context.base)
    model = processes.on_all(
        lambda: adapted(
            base,
            context.job.settings,
            backend=backend,
            dropout=context.stage.dropout,
            compiled=schedule["compiled"],
            base_name=base_name,
            seed=context.job.run.seed,
            log=context.log,
            added=context.added,
        )
    )
    processes.on_all(
        lambda: check_sums(
            context.base, model_without_weights(context.config), adapted_weights(model)
        )
    )
    model.peft_config["default"].revision = revision
    if schedule["ordered_weights"]:
        order_weights(model)
        order_head(model.get_base_model())
    return model, schedule, budget


def compile_model(
    context: TrainContext, model: Any, dataset: EncodedDataset, schedule: dict[str, Any]
) -> Compiling:
    """Have torch.compile's graphs made before the clock runs, where the schedule says so."""
    if not schedule["compiled"]:
        return Compiling()
    settle_compile_caches(context.log)
    compiling = context.engine.processes.on_all(
        lambda: warm_up(model, dataset, context.engine.device, seed=context.job.run.seed)
    )
    context.log(f"{compiling.graphs()} graphs compiled in {compiling.seconds:.1f} s")
    return compiling


def _schedule(
    context: TrainContext, recorded: dict[str, Any], model: Any, backend: str
) -> dict[str, Any]:
    run = context.job.run
    now = resolve_schedule(
        context.engine, model, context.config,
        requested=run.tokens_per_microbatch, backend=backend, base=run.model, compiled=run.compile,
    )  # fmt: skip
    if not recorded:
        return now
    now, changes = repeat_schedule(recorded, now, run.tokens_per_microbatch)
    if changes:
        listing = ", ".join(f"{key} {old} -> {new}" for key, old, new in changes)
        context.log(
            f"going on with another schedule ({listing}): the same steps, equal up to rounding "
            "instead of bit for bit"
        )
    return now


def _declare_shapes(context: TrainContext, records: Records, schedule: dict[str, Any]) -> None:
    settings, run = context.job.settings, context.job.run
    request = BatchRequest(
        records.dataset,
        None if records.held_out is None else records.held_out.dataset,
        StepSampler(len(records.dataset), settings.batch_size, run.seed, records.parts),
        settings.max_length,
        budget=schedule["tokens_per_microbatch"],
        requested=run.tokens_per_microbatch,
        log=context.log,
    )
    engine = context.engine
    engine.shapes, schedule["tokens_per_microbatch"] = engine.processes.on_all(
        lambda: engine.device.batch_shapes(request)
    )
