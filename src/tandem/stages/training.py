"""What both training stages do around the loop: inputs, data, adapter, resume, outputs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from tandem.artifact.files import atomic_write_json, read_jsonl
from tandem.artifact.hashing import hash_json
from tandem.artifact.lock import folder_lock
from tandem.artifact.manifest import Opened, finish_stage, open_stage, start_stage
from tandem.data.order import total_steps
from tandem.data.sources import SourceSpec
from tandem.data.template import ChatTemplate
from tandem.data.trees import Trees
from tandem.model.attention import choose_backend
from tandem.model.compiled import Compiling
from tandem.model.head import order_head
from tandem.model.kernels.library import why_not
from tandem.model.load import load_model, model_folder
from tandem.model.products import order_weights
from tandem.model.vocabulary import check_added
from tandem.recipe.training import Training as TrainingSettings
from tandem.stages.adaptation import adapted, warm_up
from tandem.stages.forecast import Forecast, compared, forecast_run, keep
from tandem.stages.inputs import resolved_inputs
from tandem.stages.kind import Made, StageKind, Start
from tandem.stages.outcome import packing_in_words, save_adapter_folder, training_summary
from tandem.stages.placement import in_words, start_engine
from tandem.stages.records import Records, stage_records
from tandem.stages.schedule import repeat_schedule, resolve_schedule, token_budget_of
from tandem.stages.shapes import declared_shapes
from tandem.stages.sources import held_out_sources, source_specs
from tandem.stages.steps import take_steps
from tandem.stages.validation import (
    kept_in_words,
    kept_warnings,
    validation_summary,
)
from tandem.train.checkpoint import CheckpointStore, Progress
from tandem.train.device import attention_weight, choose_device
from tandem.train.engine import Engine
from tandem.train.held_out import best_adapters
from tandem.train.launch import launched
from tandem.train.memory import TokenBudget
from tandem.train.optim import make_optimizer
from tandem.train.processes import join
from tandem.train.progress import StageProgress, say
from tandem.train.runtime import Runtime

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
    device = choose_device(runtime.device, runtime.dtype, runtime.hpu)
    processes = join(launched(), device.backend, timedelta(minutes=runtime.timeout_minutes))
    if not processes.is_main:
        console = Console(quiet=True)
    with processes.shared_fate(), ExitStack() as held:
        engine = processes.together(lambda: start_engine(device, processes, settings, runtime))
        processes.require_same(engine=hash_json([engine.strategy.name, engine.strategy.config]))
        base = processes.main_first(lambda: model_folder(model, revision))
        sources = processes.main_first(lambda: source_specs(settings.data, output_dir.parent, seed))
        held_out = processes.main_first(
            lambda: held_out_sources(settings, sources, output_dir.parent, seed)
        )
        config, tokenizer, template, inputs = processes.together(
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
        added = inputs["model"].get("added_tokens", {})
        check_added(added, engine=engine.strategy.name, sharded=engine.sharded)
        processes.require_same(
            model=hash_json(inputs["model"]),
            settings=hash_json({key: inputs[key] for key in ("settings", "chat_template", "seed")}),
        )
        processes.main(lambda: held.enter_context(folder_lock(output_dir)))
        opened = processes.main(lambda: open_stage(output_dir, kind.name, inputs))
        if opened.state == "finished":
            say(console, f"{kind.name}: {output_dir} is finished with these inputs; nothing to do")
            return output_dir
        for notice in template.notices:
            say(console, f"{kind.name}: {notice}")
        stage = _Stage(
            kind, settings, output_dir, seed, runtime, engine, console, base, config, model,
            tokenizer, template, tuple(added.values()),
        )  # fmt: skip
        stage.run(opened, inputs, sources, held_out)
    return output_dir


@dataclass(frozen=True)
class _Stage:
    """The resolved pieces of one stage on their way through `run`."""

    kind: StageKind
    settings: TrainingSettings
    folder: Path
    seed: int
    runtime: Runtime
    engine: Engine
    console: Console
    base: Path
    config: Any
    base_name: str
    tokenizer: Any
    template: ChatTemplate
    added_ids: tuple[int, ...]

    def run(
        self,
        opened: Opened,
        inputs: dict[str, Any],
        sources: list[SourceSpec],
        held_out: list[SourceSpec],
    ) -> None:
        """Load, adapt, train and write; what can be refused is, before anything is written."""
        engine, processes, settings = self.engine, self.engine.processes, self.settings
        # The others find what the first has encoded, where they share its cache.
        records = processes.main_first(lambda: self._records(sources, held_out))
        trees = records.trees
        if processes.count > 1:
            processes.require_same(data=records.identity())
        held = engine.device.held_memory()
        model, schedule, budget = self._model(records, opened.schedule)
        # From here on the folder is this stage's.
        processes.main(lambda: start_stage(self.folder, self.kind.name, inputs, schedule))
        processes.main(records.write_ledgers)
        total = total_steps(
            len(trees), settings.batch_size,
            epochs=settings.epochs, max_steps=settings.max_steps, parts=records.parts,
        )  # fmt: skip
        expected = processes.main(lambda: self._forecast(records, model, schedule, held))
        compiled = self._compiled(model, trees, schedule)
        progress, state = self._begin(model, total)
        engine.prepare(
            model,
            partial(
                make_optimizer,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                betas=(settings.adam_beta1, settings.adam_beta2),
                epsilon=settings.adam_epsilon,
                kind=engine.device.adamw,
            ),
            settings.max_grad_norm,
        )
        if state:
            engine.strategy.load_optimizer(state)
        start = Start(
            engine,
            model,
            trees,
            hash_json(inputs["model"]),
            schedule["attention"],
            f"{schedule['kernels']}, ordered weights: {schedule['ordered_weights']}"
            + (", compiled" if schedule["compiled"] else ""),
            budget,
            self.console,
        )
        made = [self.kind.make_objective(start)]
        if records.held_out is not None:
            held_out_start = replace(start, trees=records.held_out.trees, what="held-out ")
            made.append(self.kind.make_objective(held_out_start))
        with StageProgress(
            self.console, self.kind.name, total_steps=total, start_step=progress.step
        ) as display:
            progress = take_steps(
                engine, model, records, [each.objective for each in made], settings,
                dropout=self.kind.dropout, attention_weight=attention_weight(self.config),
                budget=budget, seed=self.seed, folder=self.folder, checkpoints=self._checkpoints(),
                progress=progress, total=total, display=display,
            )  # fmt: skip
        trained = engine.strategy.trained()
        processes.main(
            lambda: self._finish(
                model, trained, records, made, progress, schedule, compiled, expected
            )
        )

    def _records(self, sources: list[SourceSpec], held_out: list[SourceSpec]) -> Records:
        return stage_records(
            self.kind.prepare,
            sources,
            held_out,
            self.settings,
            tokenizer=self.tokenizer,
            template=self.template,
            folder=self.folder,
            name=self.kind.name,
            seed=self.seed,
            console=self.console,
        )

    def _model(
        self, records: Records, recorded: dict[str, Any]
    ) -> tuple[Any, dict[str, Any], TokenBudget]:
        """The base with its adapter, the schedule and the budget; says how it will compute."""
        engine, processes = self.engine, self.engine.processes
        device = engine.device
        base = processes.together(
            lambda: load_model(
                self.base,
                dtype=device.weights,
                # Whole models may not fit on a device; what is spread goes there in parts.
                device=torch.device("cpu") if engine.sharded else device.torch_device,
                quantization=self.runtime.quantization,
            )
        )
        backend, why = processes.together(
            lambda: choose_backend(
                self.runtime.attention, base,
                static_shapes=device.static_shapes, fused=device.fused_attention,
            )
        )  # fmt: skip
        schedule = self._schedule(recorded, base, backend)
        self._declare_shapes(records, schedule)
        torch.set_num_threads(schedule["threads"])
        budget = token_budget_of(engine, self.folder, schedule, self._tell)
        self._tell(
            f"{in_words(engine)}, {device.dtype_name}, attention {backend} ({why}), "
            f"{budget.tokens} tokens a micro-batch"
        )
        if self.runtime.quantization and device.is_host:
            self._tell(
                "4-bit weights are unpacked at every use, which is slow on a CPU and made for "
                "memory that is short"
            )
        if device.is_host and (reason := why_not()):
            self._tell(f"torch's own operators, no C kernels: {reason}")
        model = processes.together(
            lambda: adapted(
                base,
                self.settings,
                backend=backend,
                dropout=self.kind.dropout,
                compiled=schedule["compiled"],
                base_name=str(self.base) if self.base_name.startswith("demo:") else self.base_name,
                seed=self.seed,
                tell=self._tell,
                added_ids=self.added_ids,
            )
        )
        if schedule["ordered_weights"]:
            order_weights(model)
            order_head(model.get_base_model())
        return model, schedule, budget

    def _tell(self, text: str) -> None:
        say(self.console, f"{self.kind.name}: {text}")

    def _compiled(self, model: Any, trees: Trees, schedule: dict[str, Any]) -> Compiling:
        if not schedule["compiled"]:
            return Compiling()
        compiling = self.engine.processes.together(
            lambda: warm_up(model, trees, self.engine.device, seed=self.seed)
        )
        self._tell(f"{compiling.graphs()} graphs compiled in {compiling.seconds:.1f} s")
        return compiling

    def _begin(self, model: Any, total: int) -> tuple[Progress, dict[str, Tensor]]:
        """Where the run stands, and the optimizer's tensors; puts the adapter's weights there."""
        checkpoints, processes = self._checkpoints(), self.engine.processes
        newest = processes.main(checkpoints.newest)
        if newest is None:
            return Progress(), {}
        progress, state = processes.together(partial(checkpoints.load, newest, model))
        self._tell(f"going on from {newest} (step {progress.step} of {total})")
        return progress, state

    def _checkpoints(self) -> CheckpointStore:
        return CheckpointStore(self.folder / "checkpoints", keep=self.settings.save_total_limit)

    def _schedule(self, recorded: dict[str, Any], model: Any, backend: str) -> dict[str, Any]:
        now = resolve_schedule(
            self.engine, model, self.config,
            requested=self.runtime.tokens_per_microbatch, backend=backend, base=self.base_name,
            compiled=self.runtime.compile,
        )  # fmt: skip
        if not recorded:
            return now
        now, changes = repeat_schedule(recorded, now, self.runtime.tokens_per_microbatch)
        if changes:
            listing = ", ".join(f"{key} {old} -> {new}" for key, old, new in changes)
            self._tell(
                f"going on with another schedule ({listing}): the same steps, equal up to rounding "
                "instead of bit for bit"
            )
        return now

    def _declare_shapes(self, records: Records, schedule: dict[str, Any]) -> None:
        held_out = records.held_out
        self.engine.buckets, schedule["tokens_per_microbatch"] = self.engine.processes.together(
            lambda: declared_shapes(
                records.trees, self.settings,
                device=self.engine.device, runtime=self.runtime,
                budget=schedule["tokens_per_microbatch"], seed=self.seed,
                tell=self._tell, parts=records.parts,
                held_out=None if held_out is None else held_out.trees,
            )
        )  # fmt: skip

    def _forecast(
        self, records: Records, model: Any, schedule: dict[str, Any], held: int
    ) -> Forecast | None:
        try:
            return forecast_run(
                self.kind.name, records.trees, model, self.settings,
                engine=self.engine, config=self.config, schedule=schedule, parts=records.parts,
                quantization=self.runtime.quantization, seed=self.seed, baseline=held,
            )  # fmt: skip
        except Exception as error:  # whatever a strange model leads to, training can do without
            self._tell(f"nothing is estimated of this run ({type(error).__name__}: {error})")
            return None

    def _finish(
        self,
        model: Any,
        trained: dict[str, Tensor],
        records: Records,
        made: Sequence[Made],
        progress: Progress,
        schedule: dict[str, Any],
        compiled: Compiling,
        expected: Forecast | None,
    ) -> None:
        best = best_adapters(self.folder)
        kept = None if progress.best_step is None else best.path_of(progress.best_step)
        outputs = save_adapter_folder(
            self.folder, model, trained, self.tokenizer, self.template, kept
        )
        warnings = [
            *self.kind.warnings(read_jsonl(self.folder / "metrics.jsonl")),
            *kept_warnings(self.settings, progress),
        ]
        for warning in warnings:
            say(self.console, f"{self.kind.name}: {warning}", style="yellow")
        summary = {
            **training_summary(progress, records.trees),
            **validation_summary(self.settings, records.held_out, progress, self.folder),
            "mixture": records.mixture,
            "compile_seconds": compiled.seconds,
            "compiled_graphs": compiled.graphs(),
            "reference_seconds": sum(each.reference_seconds for each in made),
            "reference_computed": sum(each.reference_computed for each in made),
            "peak_memory_bytes": self.engine.device.peak_memory(),
            "warnings": [*records.warnings(), *warnings],
            "dtype": self.engine.device.dtype_name,
            "quantization": self.runtime.quantization,
            "ledger": records.ledger.summary(),
            **{key: schedule[key] for key in _OF_THE_SCHEDULE},
        }
        if expected is not None:
            summary["estimate"] = compared(expected, summary)
            try:
                keep(expected, summary["estimate"], summary)
            except OSError as error:
                self._tell(f"how fast this was cannot be kept for the next plan ({error})")
        atomic_write_json(self.folder / "summary.json", summary)
        outputs += ["summary.json", "metrics.jsonl"]
        if records.held_out is not None:
            outputs.append("validation.jsonl")
        finish_stage(self.folder, outputs)
        best.clear()
        if words := kept_in_words(self.settings, progress):
            self._tell(words)
        self._tell(
            f"{progress.step} steps, {progress.examples} examples in {progress.seconds:.1f} s, "
            f"{packing_in_words(summary)} -> {self.folder}"
        )
