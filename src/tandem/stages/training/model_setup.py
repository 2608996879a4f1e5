"""The model that a stage trains: loaded, prepared, compiled if asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tandem.data.batching.collate import collate, record_key
from tandem.data.batching.sampler import StepSampler
from tandem.data.encoded.dataset import EncodedDataset
from tandem.model.attention.select import choose_backend
from tandem.model.cpu.c_kernels import unavailable_reason
from tandem.model.elementwise import Compiling, settle_compile_caches
from tandem.model.full.full_weights import training_dtype
from tandem.model.load_model import load_in_layers, load_model
from tandem.model.logprobs.sequence_logps import sequence_logps
from tandem.model.lora.principal import share_beginnings
from tandem.model.lora.targets import adapted_weights
from tandem.model.model_folder import model_without_weights
from tandem.model.prepare_model import FOR_TRAINING, Preparation, prepare_model
from tandem.model.weight_files import check_sums
from tandem.runtime.device import BatchRequest
from tandem.stages.training.context import TrainContext
from tandem.stages.training.execution import decide_execution, in_words, token_budget_of
from tandem.stages.training.training_data import TrainingData
from tandem.train.token_budget import TokenBudget


def set_up_model(
    context: TrainContext, records: TrainingData, recorded: dict[str, Any]
) -> tuple[Any, dict[str, Any], TokenBudget]:
    """The base with its adapter, how the work is done, and the budget; says so on the console."""
    engine, processes = context.engine, context.engine.processes
    device = engine.device
    base = processes.on_all(lambda: _load(context))
    attention = context.job.run.attention
    backend, why = processes.on_all(
        lambda: device.attention(attention, base) or choose_backend(attention, base)
    )
    execution = decide_execution(context, base, backend, recorded)
    _declare_shapes(context, records, execution)
    torch.set_num_threads(execution["threads"])
    budget = token_budget_of(engine, context.job.folder, execution, context.log)
    context.log(
        f"{in_words(engine)}, {device.dtype_name}, attention {backend} ({why}), "
        f"{budget.tokens} tokens a micro-batch"
    )
    if context.job.run.quantization and device.is_host:
        context.log(
            "4-bit weights are unpacked at every use, which is slow on a CPU and made for "
            "memory that is short"
        )
    if device.is_host and (reason := unavailable_reason()):
        context.log(f"torch's own operators, no C kernels: {reason}")
    preparation = Preparation(
        added=context.base.added,
        attention=backend,
        weights=context.weights,
        compiled=execution["compiled"],
        noise=context.noise,
        recomputed=context.job.settings.gradient_checkpointing,
        reordered=execution["ordered_weights"],
    )
    model = processes.on_all(lambda: prepare_model(base, FOR_TRAINING, preparation, context.log))
    share_beginnings(model, processes)
    if context.weights.leaves == "adapter":
        described = model_without_weights(context.base.config)
        processes.on_all(lambda: check_sums(context.base.folder, described, adapted_weights(model)))
    return model, execution, budget


def _load(context: TrainContext) -> Any:
    """The base on its device; in an engine that shards on the CPU, from where it goes in parts."""
    engine, folder, full = context.engine, context.base.folder, context.job.settings.full
    dtype = training_dtype(engine.device.weights) if full else engine.device.weights
    if engine.sharded:
        return load_in_layers(folder, dtype=dtype, processes=engine.processes.count)
    return load_model(
        folder,
        dtype=dtype,
        device=engine.device.torch_device,
        quantization=context.job.run.quantization,
        # Engines of other libraries want parameters of one dtype.
        may_stay_stored=engine.name in ("single", "ddp") and not full,
        log=context.log,
    )


def compile_model(
    context: TrainContext, model: Any, dataset: EncodedDataset, execution: dict[str, Any]
) -> Compiling:
    """Have torch.compile's graphs made before the clock runs, if asked for."""
    if not execution["compiled"]:
        return Compiling()
    settle_compile_caches(context.log)
    device, compiling = context.engine.device, Compiling()
    # Before the engine takes over the model: it may watch every backward.
    batches = [
        collate([dataset[i]], [record_key(context.job.run.seed, 0, i)]).to(device.torch_device)
        for i in (0, len(dataset) - 1)
    ]

    def warm_up() -> None:
        with torch.autocast(device.kind, device.autocast, enabled=device.autocast is not None):
            compiling.warm_up(model, partial(sequence_logps, model), batches)

    context.engine.processes.on_all(warm_up)
    context.log(f"{compiling.graphs()} graphs compiled in {compiling.seconds:.1f} s")
    return compiling


def _declare_shapes(
    context: TrainContext, records: TrainingData, execution: dict[str, Any]
) -> None:
    settings = context.job.settings
    request = BatchRequest(
        records.dataset,
        None if records.held_out is None else records.held_out.dataset,
        StepSampler(len(records.dataset), settings.batch_size, context.job.run.seed, records.parts),
        settings.max_length,
        budget=execution["tokens_per_microbatch"],
        requested=context.job.run.tokens_per_microbatch,
        log=context.log,
    )
    context.engine.shapes, execution["tokens_per_microbatch"] = context.engine.processes.on_all(
        lambda: context.engine.device.batch_shapes(request)
    )
