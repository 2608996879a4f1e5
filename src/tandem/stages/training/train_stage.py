"""What both training stages do around the loop: inputs, data, adapter, resume, outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from tandem.data.batching.sampler import StepSampler
from tandem.data.resolve_sources import held_out_sources, resolve_sources
from tandem.data.tokenize.added_tokens import AddedTokens, row_notices
from tandem.data.tokenize.chat_template import ChatTemplate
from tandem.integrations.choose import device_of, idle_settings
from tandem.model.added_tokens import check_added, described_rows, in_words, untrained_tokens
from tandem.model.elementwise import Compiling
from tandem.model.model_folder import model_folder
from tandem.plan.stage_estimate import StageEstimate, compare, estimate_run, remember_run
from tandem.recipe.data_source import DataSource
from tandem.recipe.run_settings import Runtime
from tandem.recipe.training_settings import TrainingSettings
from tandem.recipe.unmeant import unmeant
from tandem.runtime.console import StageProgress, log
from tandem.runtime.launch import launched
from tandem.runtime.process_group import join
from tandem.stages.training.context import Made, Stage, StageKind, Start
from tandem.stages.training.engine_setup import start_engine
from tandem.stages.training.fingerprint import resolved_inputs
from tandem.stages.training.held_out import kept_in_words, kept_warnings, validation_summary
from tandem.stages.training.model_setup import compile_model, set_up_model
from tandem.stages.training.outputs import packing_in_words, save_adapter_folder, training_summary
from tandem.stages.training.trainer_setup import prepare_engine, take_steps
from tandem.stages.training.training_data import Records, stage_records
from tandem.storage.atomic_files import atomic_write_json, read_jsonl
from tandem.storage.folder_lock import folder_lock
from tandem.storage.hashing import hash_json
from tandem.storage.manifest import check_made, finish_stage, open_stage, start_stage
from tandem.train.checkpoint import CheckpointStore, RunState
from tandem.train.held_out_evaluation import best_adapters, forget_after, why_best_is_gone
from tandem.train.token_budget import TokenBudget

# Of the schedule: what a template that writes the date gets.
_DATE = "template_date"
# What the summary repeats of the schedule.
_OF_THE_SCHEDULE = ("processes", "engine", "attention", "device", "float32_products")


def run_training(
    kind: StageKind,
    *,
    model: str,
    revision: str | None,
    settings: TrainingSettings,
    output_dir: Path,
    chat_template: str | None,
    seed: int,
    runtime: Runtime,
    console: Console,
    added_tokens: Sequence[str] = (),
) -> Path:
    """Run, resume or recognise as finished one training stage; returns its folder.

    Where a launcher started several processes, all of them call it, and rank 0 alone writes.

    Raises UserError for bad input, a folder with other inputs, or one in use.
    """
    device = device_of(runtime)
    processes = join(launched(), device.backend, timedelta(minutes=runtime.timeout_minutes))
    if not processes.is_rank0:
        console = Console(quiet=True)
    with processes.shared_fate(), ExitStack() as held:
        for notice in idle_settings(runtime, device):
            log(console, f"{kind.name}: {notice}")
        engine = processes.on_all(lambda: start_engine(device, processes, settings, runtime))
        processes.require_same(engine=hash_json([engine.name, engine.config]))
        base = processes.rank0_first(lambda: model_folder(model, revision))
        sources = processes.rank0_first(
            lambda: resolve_sources(settings.data, output_dir.parent, seed)
        )
        held_out = processes.rank0_first(
            lambda: held_out_sources(settings, sources, output_dir.parent, seed)
        )
        processes.on_rank0(
            lambda: check_made(base, lambda text: log(console, f"{kind.name}: {text}"))
        )
        config, tokenizer, template, added, inputs = processes.on_all(
            lambda: resolved_inputs(
                base,
                sources,
                held_out,
                settings,
                chat_template,
                seed,
                runtime,
                device,
                added_tokens,
            )
        )
        check_added({*added.new, *added.known}, engine=engine.name, sharded=engine.sharded)
        processes.require_same(
            model=hash_json(inputs["model"]),
            settings=hash_json({key: inputs[key] for key in ("settings", "chat_template", "seed")}),
        )
        lock = folder_lock(output_dir, lambda text: log(console, f"{kind.name}: {text}"))
        processes.on_rank0(lambda: held.enter_context(lock))
        opened = processes.on_rank0(lambda: open_stage(output_dir, kind.name, inputs))
        if opened.state == "finished":
            log(console, f"{kind.name}: {output_dir} is finished with these inputs; nothing to do")
            return output_dir
        rows = described_rows(config, added)
        for notice in (*template.notices, *row_notices(tokenizer, rows)):
            log(console, f"{kind.name}: {notice}")
        template, recorded = processes.on_rank0(lambda: _dated(template, opened.schedule))
        stage = Stage(
            kind, settings, output_dir, seed, runtime, engine, console, base, config, model,
            tokenizer, template, added,
            processes.on_rank0(lambda: _row_warnings(base, config, tokenizer, template, added)),
        )  # fmt: skip
        for warning in stage.warnings:
            log(console, f"{kind.name}: {warning}", style="yellow")
        _run(stage, recorded, inputs, sources, held_out)
    return output_dir


def _dated(template: ChatTemplate, recorded: dict[str, Any]) -> tuple[ChatTemplate, dict[str, Any]]:
    """The template with the date that a stage began with, and the rest of its schedule."""
    rest = {key: value for key, value in recorded.items() if key != _DATE}
    if template.now is not None and _DATE in recorded:
        template = replace(template, now=datetime.fromisoformat(recorded[_DATE]))
    return template, rest


def _run(
    stage: Stage,
    recorded: dict[str, Any],
    inputs: dict[str, Any],
    sources: list[DataSource],
    held_out: list[DataSource],
) -> None:
    """Load, adapt, train and write; what can be refused is, before anything is written."""
    engine, processes, settings = stage.engine, stage.engine.processes, stage.settings
    # The others find what the first has encoded, where they share its cache.
    records = processes.rank0_first(lambda: _records(stage, sources, held_out))
    if processes.count > 1:
        processes.require_same(data=records.identity())
    held = engine.device.held_memory()
    model, schedule, budget = set_up_model(stage, records, recorded)
    if stage.template.now is not None:
        schedule[_DATE] = stage.template.now.isoformat(timespec="seconds")
    # From here on the folder is this stage's.
    processes.on_rank0(lambda: start_stage(stage.folder, stage.kind.name, inputs, schedule))
    processes.on_rank0(records.write_ledgers)
    sampler = StepSampler(len(records.dataset), settings.batch_size, sources=records.parts)
    total = sampler.total_steps(settings)
    expected = processes.on_rank0(lambda: _estimate(stage, records, model, schedule, held))
    compiled = compile_model(stage, model, records.dataset, schedule)
    progress, state = _begin(stage, model, total)
    doubts = unmeant(settings, steps=total, records=len(records.dataset), processes=processes.count)
    for doubt in doubts:
        log(stage.console, f"{stage.kind.name}: {doubt}", style="yellow")
    stage = replace(stage, warnings=(*stage.warnings, *doubts))
    prepare_engine(stage, model, state)
    made = _objectives(stage, model, records, hash_json(inputs["model"]), schedule, budget)
    with StageProgress(
        stage.console, stage.kind.name, total_steps=total, start_step=progress.step
    ) as display:
        progress = take_steps(
            stage, model, records, [each.objective for each in made],
            budget=budget, progress=progress, total=total, display=display,
        )  # fmt: skip
    trained = engine.trained()
    processes.on_rank0(
        lambda: _finish(
            stage, model, trained, records, made, progress, schedule, compiled, expected
        )
    )


def _row_warnings(
    base: Path, config: Any, tokenizer: Any, template: ChatTemplate, added: AddedTokens
) -> tuple[str, ...]:
    words = in_words(untrained_tokens(base, config, tokenizer, template, added.ids))
    return () if words is None else (words,)


def _records(stage: Stage, sources: list[DataSource], held_out: list[DataSource]) -> Records:
    return stage_records(
        stage.kind.prepare,
        sources,
        held_out,
        stage.settings,
        tokenizer=stage.tokenizer,
        template=stage.template,
        folder=stage.folder,
        name=stage.kind.name,
        seed=stage.seed,
        console=stage.console,
        rows=stage.rows,
    )


def _estimate(
    stage: Stage, records: Records, model: Any, schedule: dict[str, Any], held: int
) -> StageEstimate | None:
    try:
        return estimate_run(stage, records, model, schedule, held)
    except Exception as error:  # whatever a strange model leads to, training can do without
        stage.log(f"nothing is estimated of this run ({type(error).__name__}: {error})")
        return None


def _begin(stage: Stage, model: Any, total: int) -> tuple[RunState, dict[str, Tensor]]:
    """Where the run stands, and the optimizer's tensors; puts the adapter's weights there."""
    checkpoints, processes = stage.checkpoints(), stage.engine.processes
    usable = partial(why_best_is_gone, best_adapters(stage.folder, stage.weights))
    newest = processes.on_rank0(lambda: checkpoints.newest(stage.log, usable))
    if newest is None:
        return RunState(), {}
    progress, state = processes.on_all(partial(checkpoints.load, newest, model))
    processes.on_rank0(lambda: _clean_lines(stage, checkpoints, newest, progress.step))
    stage.log(f"going on from {newest} (step {progress.step} of {total})")
    return progress, state


def _clean_lines(stage: Stage, checkpoints: CheckpointStore, newest: Path, step: int) -> None:
    """Leave in the files of metrics what a checkpoint knows of, and say what is not as it was."""
    for path in checkpoints.lines:
        forget_after(path, step)
    for path in checkpoints.changed_lines(newest):
        stage.log(
            f"{path} is not as it was at step {step}: it was damaged or changed, lines that cannot "
            "be read are left out of it. What is trained does not depend on it"
        )


def _objectives(
    stage: Stage,
    model: Any,
    records: Records,
    model_hash: str,
    schedule: dict[str, Any],
    budget: TokenBudget,
) -> list[Made]:
    """What a step minimises, and the same for held-out records if there are any."""
    start = Start(
        stage.engine,
        model,
        records.dataset,
        model_hash,
        schedule["attention"],
        f"{schedule['kernels']}, ordered weights: {schedule['ordered_weights']}"
        + (", compiled" if schedule["compiled"] else ""),
        budget,
        stage.console,
        stage.weights,
    )
    made = [stage.kind.make_objective(start)]
    if records.held_out is not None:
        held_out = replace(start, dataset=records.held_out.dataset, what="held-out ")
        made.append(stage.kind.make_objective(held_out))
    return made


def _finish(
    stage: Stage,
    model: Any,
    trained: dict[str, Tensor],
    records: Records,
    made: Sequence[Made],
    progress: RunState,
    schedule: dict[str, Any],
    compiled: Compiling,
    expected: StageEstimate | None,
) -> None:
    best = best_adapters(stage.folder, stage.weights)
    kept = None if progress.best_step is None else best.path_of(progress.best_step)
    outputs = save_adapter_folder(stage, model, trained, kept)
    warnings = [
        *stage.kind.warnings(read_jsonl(stage.folder / "metrics.jsonl")),
        *kept_warnings(stage.settings, progress),
    ]
    for warning in warnings:
        log(stage.console, f"{stage.kind.name}: {warning}", style="yellow")
    summary = {
        **training_summary(progress, records.dataset),
        **validation_summary(stage.settings, records.held_out, progress, stage.folder),
        "mixture": records.mixture,
        "compile_seconds": compiled.seconds,
        "compiled_graphs": compiled.graphs(),
        "reference_seconds": sum(each.reference_seconds for each in made),
        "reference_computed": sum(each.reference_computed for each in made),
        "peak_memory_bytes": stage.engine.device.peak_memory(),
        "warnings": [*stage.warnings, *records.warnings(), *warnings],
        "dtype": stage.engine.device.dtype_name,
        "quantization": stage.runtime.quantization,
        "ledger": records.ledger.summary(),
        **{key: schedule[key] for key in _OF_THE_SCHEDULE},
    }
    if expected is not None:
        summary["estimate"] = compare(expected, summary)
        try:
            remember_run(expected, summary["estimate"], summary)
        except OSError as error:
            stage.log(f"how fast this was cannot be kept for the next plan ({error})")
    atomic_write_json(stage.folder / "summary.json", summary)
    outputs += ["summary.json", "metrics.jsonl"]
    if records.held_out is not None:
        outputs.append("validation.jsonl")
    if (stage.folder / "data-ledger.jsonl").exists():
        outputs.append("data-ledger.jsonl")
    finish_stage(stage.folder, outputs)
    best.clear()
    if words := kept_in_words(stage.settings, progress):
        stage.log(words)
    stage.log(
        f"{progress.step} steps, {progress.examples} examples in {progress.seconds:.1f} s, "
        f"{packing_in_words(summary)} -> {stage.folder}"
    )
