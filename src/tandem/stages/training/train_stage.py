"""What both training stages do around the loop: inputs, data, adapter, resume, outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from tandem.data.batching.sampler import StepSampler
from tandem.data.resolve_sources import held_out_sources, resolve_sources
from tandem.integrations.choose import device_of, idle_settings
from tandem.model.added_tokens import check_added
from tandem.model.base_model import BaseModelInfo, load_base_info
from tandem.model.elementwise import Compiling
from tandem.model.model_folder import model_folder
from tandem.recipe.jobs import TrainingJob
from tandem.recipe.unmeant import unmeant
from tandem.runtime.console import StageProgress, log, say_finished
from tandem.runtime.launch import launched
from tandem.runtime.process_group import join
from tandem.stages.finished import training_inputs
from tandem.stages.training.adapter_checks import check_adapter, check_start
from tandem.stages.training.asked_prompts import asked_prompts
from tandem.stages.training.context import (
    BuiltObjective,
    ObjectiveInputs,
    TrainContext,
    TrainingStage,
)
from tandem.stages.training.execution import start_engine
from tandem.stages.training.held_out import kept_in_words, kept_warnings, validation_summary
from tandem.stages.training.model_setup import compile_model, set_up_model
from tandem.stages.training.outputs import packing_in_words, save_result, training_summary
from tandem.stages.training.trainer_setup import build_trainer, prepare_engine, restore
from tandem.stages.training.training_data import StageReader, TrainingData
from tandem.storage.atomic_files import atomic_write_json, read_jsonl
from tandem.storage.folder_lock import folder_lock
from tandem.storage.hashing import hash_json
from tandem.storage.manifest import check_made, finish_stage, open_stage, start_stage
from tandem.storage.run_folder import run_of
from tandem.train.callbacks.answer_prompts import SAMPLES, AskedPrompt
from tandem.train.callbacks.callback import Callback, TrainingRun
from tandem.train.callbacks.held_out_evaluation import best_adapters, why_best_is_gone
from tandem.train.checkpoint import CheckpointStore, RunState, forget_after
from tandem.train.engines.engine import Engine
from tandem.train.token_budget import TokenBudget

# The execution's key for the date that a template writes.
_DATE = "template_date"
# Keys of the execution that the summary repeats.
_OF_THE_EXECUTION = ("processes", "engine", "attention", "device", "float32_products")


def train_stage(
    stage: TrainingStage, job: TrainingJob, console: Console, callbacks: Sequence[Callback] = ()
) -> Path:
    """Run or resume a training stage, unless it is finished; returns its folder.

    Where a launcher started several processes, all of them call it, and rank 0 alone writes. The
    callbacks are called after the stage's own.

    Raises UserError for bad input, a folder with other inputs, or one in use.
    """
    run, folder = job.run, job.folder
    device = device_of(run)
    processes = join(launched(), device.backend, timedelta(minutes=run.timeout_minutes))
    if not processes.is_rank0:
        console = Console(quiet=True)
    with processes.shared_fate(), ExitStack() as locks:
        for notice in idle_settings(run, device, job.settings.optimizer):
            log(console, f"{stage.name}: {notice}")
        engine = processes.on_all(lambda: start_engine(device, processes, job))
        processes.require_same(engine=hash_json([engine.name, engine.config]))
        context = _look_up(stage, job, engine, console)
        base, data = context.base, (context.sources, context.held_out)
        collect = partial(training_inputs, job, base.folder, base.template, base.added, data)
        inputs = processes.on_all(lambda: collect(device.dtype_name))
        added = {*base.added.new, *base.added.known}
        check_added(added, engine=engine.name, sharded=engine.sharded)
        processes.require_same(
            model=hash_json(inputs["model"]),
            settings=hash_json({key: inputs[key] for key in ("settings", "chat_template", "seed")}),
        )
        lock = folder_lock(folder, context.log)
        processes.on_rank0(lambda: locks.enter_context(lock))
        opened = processes.on_rank0(lambda: open_stage(folder, stage.name, inputs))
        if opened.state == "finished":
            say_finished(console, stage.name, folder)
            return folder
        processes.on_rank0(lambda: _check(callbacks))
        for notice in context.base.notices():
            context.log(notice)
        base, recorded = processes.on_rank0(lambda: _dated(context.base, opened.schedule))
        context = replace(context, base=base)
        if not job.settings.full:
            context = context.warned(*processes.on_rank0(base.warnings))
        _run(context, recorded, inputs, callbacks)
    return folder


def _look_up(
    stage: TrainingStage, job: TrainingJob, engine: Engine, console: Console
) -> TrainContext:
    """Find the model and the data that a job names; raises UserError for what cannot be used."""
    processes, settings, run = engine.processes, job.settings, job.run
    folder = processes.rank0_first(lambda: model_folder(run.model, run.model_revision))
    beside = run_of(job.folder)
    sources = processes.rank0_first(lambda: resolve_sources(settings.data, beside, run.seed))
    held_out = processes.rank0_first(lambda: held_out_sources(settings, sources, beside, run.seed))
    processes.on_rank0(
        lambda: check_made(folder, lambda text: log(console, f"{stage.name}: {text}"))
    )
    base = processes.on_all(lambda: load_base_info(run, folder, settings.max_length))
    processes.on_all(lambda: check_start(run, settings, base))
    processes.on_all(lambda: check_adapter(settings, base))
    return TrainContext(stage, job, engine, console, base, sources, held_out)


def _check(callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        callback.check()


def _dated(base: BaseModelInfo, recorded: dict[str, Any]) -> tuple[BaseModelInfo, dict[str, Any]]:
    """The base, its template with the date that a stage began with; the rest of its execution."""
    rest = {key: value for key, value in recorded.items() if key != _DATE}
    if base.template.now is not None and _DATE in recorded:
        template = replace(base.template, now=datetime.fromisoformat(recorded[_DATE]))
        base = replace(base, template=template)
    return base, rest


def _run(
    context: TrainContext,
    recorded: dict[str, Any],
    inputs: dict[str, Any],
    callbacks: Sequence[Callback],
) -> None:
    """Load, adapt, train and write; mistakes are refused before anything is written."""
    engine, processes = context.engine, context.engine.processes
    stage, settings, folder = context.stage, context.job.settings, context.job.folder
    context = replace(context, prompts=_prompts(context))
    # The other processes find what rank 0 has encoded, where they share its cache.
    records = processes.rank0_first(lambda: _records(context))
    if processes.count > 1:
        processes.require_same(data=records.identity())
    baseline = engine.device.held_memory()
    model, execution, budget = set_up_model(context, records, recorded)
    if (now := context.base.template.now) is not None:
        execution[_DATE] = now.isoformat(timespec="seconds")
    # From here on the folder is this stage's.
    processes.on_rank0(lambda: start_stage(folder, stage.name, inputs, execution))
    processes.on_rank0(records.write_ledgers)
    sampler = StepSampler(
        len(records.dataset), settings.batch_size, context.job.run.seed, records.parts
    )
    run = TrainingRun(
        stage.name, context.job, engine, context.base.config, records.dataset, sampler,
        sampler.total_steps(settings), execution, context.log, callbacks, baseline_memory=baseline,
        held_out=None if records.held_out is None else records.held_out.dataset,
    )  # fmt: skip
    with ExitStack() as closing:
        for callback in callbacks:
            closing.callback(callback.on_close, run)
            callback.on_set_up(run, model)
        _train(context, run, _Loaded(model, records, execution, budget), inputs)


@dataclass(frozen=True)
class _Loaded:
    """What is there before the first step."""

    model: Any
    records: TrainingData
    execution: dict[str, Any]
    budget: TokenBudget


def _train(
    context: TrainContext, run: TrainingRun, loaded: _Loaded, inputs: dict[str, Any]
) -> None:
    """Take the steps that are missing, and write what a finished stage leaves."""
    engine, processes = context.engine, context.engine.processes
    stage, settings = context.stage, context.job.settings
    model, records, execution, budget = (
        loaded.model, loaded.records, loaded.execution, loaded.budget,
    )  # fmt: skip
    compiled = compile_model(context, model, records.dataset, execution)
    newest, state = _begin(context, model, run)
    count, steps = len(records.dataset), run.total_steps
    doubts = unmeant(settings, steps=steps, records=count, processes=processes.count)
    context = context.warned(*doubts)
    average = prepare_engine(context, model, state)
    start = ObjectiveInputs(
        engine, model, records.dataset, hash_json(inputs["model"]), execution["attention"],
        _numerics(execution), budget, context.console, context.weights,
    )  # fmt: skip
    built = _objectives(stage, start, records)
    restore(context, newest, state, average)
    with StageProgress(context.console, stage.name, run.total_steps, run.state.step) as display:
        build_trainer(context, run, records, built, budget, display).run()
    done = _Done(model, engine.trained(), records, built, run.state, execution, compiled)
    outputs, summary = processes.on_rank0(lambda: _write_result(context, done))
    for callback in run.callbacks:
        callback.on_train_end(run, summary)
    processes.on_rank0(lambda: _finish(context, done, outputs, summary))


def _prompts(context: TrainContext) -> list[AskedPrompt]:
    """What the model is asked on the way; raises UserError where it cannot be asked at all."""
    job, engine = context.job, context.engine
    read = partial(asked_prompts, job.settings, context.base, run_of(job.folder), job.run.seed)
    return engine.processes.rank0_first(read) if job.settings.samples else []


def _records(context: TrainContext) -> TrainingData:
    stage, job, chat = context.stage, context.job, context.base.chat
    reader = StageReader(stage.name, stage.records, job.settings, chat, job.folder, context.console)
    return reader.read(context.sources, context.held_out, job.run.seed)


def _begin(
    context: TrainContext, model: Any, run: TrainingRun
) -> tuple[Path | None, dict[str, Tensor]]:
    """Restore the run and the adapter; returns the checkpoint and the optimizer's tensors."""
    checkpoints, processes = context.checkpoints(), context.engine.processes
    usable = partial(why_best_is_gone, best_adapters(context.job.folder, context.weights))
    newest = processes.on_rank0(lambda: checkpoints.newest(context.log, usable))
    if newest is None:
        return None, {}
    run.state, optimizer = processes.on_all(partial(checkpoints.load, newest, model))
    run.checkpoint = newest
    processes.on_rank0(lambda: _clean_lines(context, checkpoints, newest, run.state.step))
    context.log(f"resuming from {newest} (step {run.state.step} of {run.total_steps})")
    return newest, optimizer


def _clean_lines(
    context: TrainContext, checkpoints: CheckpointStore, newest: Path, step: int
) -> None:
    """Cut the files of metrics back to a checkpoint, and log those that were changed since."""
    for path in checkpoints.lines:
        forget_after(path, step)
    for path in checkpoints.changed_lines(newest):
        context.log(
            f"{path} is not what it was at step {step}: it was damaged or changed; lines that "
            "cannot be read are removed from it. Training does not depend on it"
        )


def _numerics(execution: dict[str, Any]) -> str:
    """What rounds the numbers of a run, in words."""
    compiled = ", compiled" if execution["compiled"] else ""
    return f"{execution['kernels']}, ordered weights: {execution['ordered_weights']}{compiled}"


def _objectives(
    stage: TrainingStage, start: ObjectiveInputs, records: TrainingData
) -> list[BuiltObjective]:
    """What a step minimises, and the same for held-out records if there are any."""
    built = [stage.make_objective(start)]
    if records.held_out is not None:
        held_out = replace(start, dataset=records.held_out.dataset, what="held-out ")
        built.append(stage.make_objective(held_out))
    return built


@dataclass(frozen=True)
class _Done:
    """A run whose steps are all taken."""

    model: Any
    trained: dict[str, Tensor]
    records: TrainingData
    objectives: Sequence[BuiltObjective]
    state: RunState
    execution: dict[str, Any]
    compiled: Compiling


def _write_result(context: TrainContext, done: _Done) -> tuple[list[str], dict[str, Any]]:
    """Write what was trained into the folder; returns its files, and what summary.json says."""
    state, folder = done.state, context.job.folder
    best = best_adapters(folder, context.weights)
    kept = None if state.best_step is None else best.path_of(state.best_step)
    outputs, of_saving = save_result(context, done.model, done.trained, kept)
    context = context.warned(*done.records.warnings(), logged=True).warned(
        *of_saving,
        *context.stage.warnings(read_jsonl(folder / "metrics.jsonl")),
        *kept_warnings(context.job.settings, state),
    )
    return outputs, _summary(context, done)


def _finish(
    context: TrainContext, done: _Done, outputs: list[str], summary: dict[str, Any]
) -> None:
    """Write summary.json, and mark the stage as finished."""
    state, folder = done.state, context.job.folder
    atomic_write_json(folder / "summary.json", summary)
    outputs = [*outputs, "summary.json", "metrics.jsonl"]
    outputs += ["validation.jsonl"] if done.records.held_out is not None else []
    outputs += [SAMPLES] if (folder / SAMPLES).exists() else []
    outputs += ["data-ledger.jsonl"] if (folder / "data-ledger.jsonl").exists() else []
    finish_stage(folder, outputs)
    best_adapters(folder, context.weights).clear()
    if words := kept_in_words(context.job.settings, state):
        context.log(words)
    context.log(
        f"{state.step} steps, {state.examples} examples in {state.seconds:.1f} s, "
        f"{packing_in_words(summary)} -> {folder}"
    )


def _summary(context: TrainContext, done: _Done) -> dict[str, Any]:
    """What summary.json says of a run, but for what callbacks add."""
    settings, records = context.job.settings, done.records
    return {
        **training_summary(done.state, records.dataset),
        **validation_summary(settings, records.held_out, done.state, context.job.folder),
        "mixture": records.mixture,
        "compile_seconds": done.compiled.seconds,
        "compiled_graphs": done.compiled.graphs(),
        "reference_seconds": sum(each.reference_seconds for each in done.objectives),
        "reference_computed": sum(each.reference_computed for each in done.objectives),
        "peak_memory_bytes": context.engine.device.peak_memory(),
        "warnings": list(context.warnings),
        "dtype": context.engine.device.dtype_name,
        "quantization": context.job.run.quantization,
        "ledger": records.ledger.summary(),
        **{key: done.execution[key] for key in _OF_THE_EXECUTION},
    }
