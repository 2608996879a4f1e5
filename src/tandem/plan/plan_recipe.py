"""`tandem plan`: what a recipe's stages would do and take, without weights and without training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tandem.data.resolve_sources import held_out_of, resolve_sources
from tandem.data.sources.rows import is_local, not_read
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.errors import UserError
from tandem.integrations.choose import choose_device, pieces_of
from tandem.model.added_tokens import check_added
from tandem.model.base_model import check_base, load_base_info
from tandem.model.model_folder import model_folder
from tandem.plan.model_shape import Described, ModelShape, described
from tandem.plan.rate import product_rate, recorded_rate
from tandem.plan.stage_estimate import (
    Disk,
    Memory,
    StageEstimate,
    StageSetup,
    copied_bytes,
    disk_of,
    memory_of,
)
from tandem.plan.workload import Workload, count_work, guess_work
from tandem.recipe.choices import SHARDS
from tandem.recipe.data_source import DataSource
from tandem.recipe.recipe import PipelineStage, Recipe, stages_of
from tandem.recipe.training_settings import TrainingSettings
from tandem.recipe.unmeant import unmeant
from tandem.runtime.device import Device
from tandem.stages.training.adapter_checks import check_start
from tandem.stages.training.execution import copies_fit
from tandem.stages.training.trainer_setup import saved_every
from tandem.stages.training.training_data import StageReader, TrainingData
from tandem.storage.run_folder import Stage, made_pairs
from tandem.train.optimizers import OPTIMIZERS, check_optimizer
from tandem.train.token_budget import token_budget

# Assumed share of trained tokens in data that is not here.
_ANSWERS = 0.5


@dataclass(frozen=True)
class PlannedData:
    """A stage's data as far as it is here."""

    sources: Sequence[DataSource]  # empty where they are not here
    held_out: Sequence[DataSource] | None = ()  # whole data sets; None where they are not here
    notes: tuple[str, ...] = ()  # what is missing, and what to do about it


@dataclass(frozen=True)
class Guess:
    """What is assumed of data that is not here: how many records, and tokens of each."""

    records: int
    tokens: int


@dataclass(frozen=True)
class TrainingPlan:
    """What one training stage would do and take; estimates where its work is known."""

    name: str
    folder: Path
    ledger: dict[str, Any] | None  # counts of its records, None where they were not read
    budget: int  # tokens of a micro-batch
    shape: ModelShape  # of the model with its adapter
    estimate: StageEstimate | None
    memory: dict[str, Memory]  # of one process by engine
    disk: Disk | None  # what it and its merge leave
    notes: tuple[str, ...]  # what is missing, guessed or left out


@dataclass(frozen=True)
class Plan:
    """A recipe's plan on this machine: its training stages, and a line on each other one."""

    device: str
    dtype: str
    processes: int
    stages: tuple[PipelineStage, ...]
    trained: tuple[TrainingPlan, ...]


def plan_recipe(
    recipe: Recipe,
    *,
    processes: int,
    download: bool,
    guesses: Sequence[Guess] = (),
    console: Console,
) -> Plan:
    """Plan every training stage of a resolved recipe; its model needs no weights.

    Args:
        processes: in how many it would run.
        download: whether data sets of the Hub may be fetched.
        guesses: assumptions on data that is not here, by training stage; the last is for all that
            follow.

    Raises UserError for a model without configuration or tokenizer, an adapter or limits that do
    not fit it, data that training would refuse, and guesses that no stage would use.
    """
    device = choose_device(recipe.device, recipe.dtype)
    planned = stages_of(recipe)
    with tempfile.TemporaryDirectory(prefix="tandem-plan-") as scratch:
        sections = {"sft": recipe.sft, "dpo": recipe.dpo}
        wanted = [(one, s) for one in planned if (s := sections.get(one.stage.work))]
        data = [
            available_data(recipe, s, download, Path(scratch), one.stage.round) for one, s in wanted
        ]
        longest = {stage.name: settings.max_length for stage, settings in wanted}
        check_guesses(guesses, longest, data)
        base = model_folder(recipe.model, recipe.model_revision, weights=False)
        check_base(base, {stage.stage.work: s for stage, s in wanted}, weights=False)
        planner = _Planner(recipe, processes, console, device, base, device.held_memory())
        trained = [
            planner.stage(stage, settings, here, guess_for(guesses, number))
            for number, ((stage, settings), here) in enumerate(zip(wanted, data, strict=True))
        ]
    return Plan(device.kind, device.dtype_name, processes, tuple(planned), tuple(trained))


def available_data(
    recipe: Recipe, settings: TrainingSettings, download: bool, scratch: Path, in_round: int = 1
) -> PlannedData:
    """The data of one training stage; that of the Hub is only read where `download` allows it.

    Temporary files go into the folder `scratch`.
    """
    notes: list[str] = []

    def here(wanted: Sequence[DataSource]) -> list[DataSource]:
        """Sources for the readers; none of them when one is on the Hub, which is noted."""
        paths = (source.path for source in wanted)
        away = [path for path in paths if not path.startswith("demo:") and not is_local(path)]
        if away and not download:
            notes.append(f"{', '.join(away)}: on the Hub, and not read")
            return []
        return resolve_sources(wanted, scratch, recipe.seed)

    if settings.data:
        way = "add --download to fetch and read it"
        sources = here(settings.data)
    else:
        pairs = Stage("pairs", in_round)
        way = f"make the pairs with `tandem run --until {pairs.name}`"
        made = made_pairs(Path(recipe.output_dir) / pairs.folder)
        sources = [] if made is None else [DataSource(path=str(made))]
        notes.append("the pairs are not made yet" if made is None else f"pairs: those of {made}")
    if not sources:
        notes.append(
            f"steps, time and memory depend on this data: {way}, or add --records N "
            "--tokens-per-record M to plan without it"
        )
        return PlannedData((), (), tuple(notes))
    before = len(notes)
    held_out = held_out_of(settings, sources, here)
    if len(notes) > before:
        notes[-1] += ", so nothing is said of the held-out records"
        return PlannedData(sources, None, tuple(notes))
    return PlannedData(sources, held_out, (*notes, *not_read([*sources, *held_out])))


def guess_for(guesses: Sequence[Guess], number: int) -> Guess | None:
    """The guess for the data of a stage, counted from 0; the last is for all that follow."""
    return guesses[min(number, len(guesses) - 1)] if guesses else None


def check_guesses(
    guesses: Sequence[Guess], longest: Mapping[str, int], data: Sequence[PlannedData]
) -> None:
    """Raise UserError for guesses that no stage would use, or whose records it would not train.

    `longest` is the max_length of each training stage by name, `data` that of each.
    """
    stages = list(longest)
    away = [number for number, here in enumerate(data, start=1) if not here.sources]
    if guesses and not away:
        raise UserError(
            "tandem plan: --records and --tokens-per-record are for data that is not here, and "
            f"that of {' and '.join(stages) or 'this recipe'} is; leave them out"
        )
    if guesses and len(guesses) > away[-1]:
        raise UserError(
            f"tandem plan: --records has {len(guesses)} numbers, one for each of "
            f"{', '.join(stages)} or one for all, and after {stages[away[-1] - 1]} no data is "
            f"missing; leave the last {len(guesses) - away[-1]} out"
        )
    for number in away:
        guess, stage = guess_for(guesses, number - 1), stages[number - 1]
        if guess is not None and guess.tokens < 2:
            raise UserError(
                f"tandem plan: --tokens-per-record {guess.tokens} leaves none to train after a "
                "first one; give at least 2"
            )
        if guess is not None and guess.tokens > longest[stage]:
            section = stage.partition("-")[0]  # of any round
            raise UserError(
                f"tandem plan: --tokens-per-record {guess.tokens} is above {section}.max_length "
                f"{longest[stage]}: no record that is trained is longer; give at most "
                f"{longest[stage]}, or raise it"
            )


@dataclass(frozen=True)
class _Planner:
    """One recipe on this machine, and the bytes that the process holds before any model."""

    recipe: Recipe
    processes: int
    console: Console
    device: Device
    base: Path
    baseline: int

    def stage(
        self,
        stage: PipelineStage,
        settings: TrainingSettings,
        data: PlannedData,
        guess: Guess | None,
    ) -> TrainingPlan:
        """The plan of one training stage."""
        recipe, device = self.recipe, self.device
        # After an SFT, and after a round, the merged model has the added tokens.
        work = stage.stage.work
        trains_added = work == "sft" or (recipe.sft is None and stage.stage.round == 1)
        base = load_base_info(recipe, self.base, settings.max_length, weights=False)
        config, added = base.config, base.added
        notes, engine = list(data.notes), self._engine(settings)
        if trains_added:
            tokens, sharded = {*added.new, *added.known}, "weights" in SHARDS[engine]
            check_added(tokens, engine=engine, sharded=sharded)
            check_start(self.recipe, settings, base, weights=False)
            notes = [*(() if settings.full else base.warnings()), *notes]
        model = described(
            config, None if settings.full else settings.lora,
            attention=recipe.attention, added=added, trains_added=trains_added,
        )  # fmt: skip
        # The run measures this with its model loaded; on CPU the processes share what is free.
        free = device.free_memory() // (self.processes if device.is_host else 1)
        free -= model.shape.parameters * device.weights.itemsize
        setup = StageSetup(
            name=work,
            settings=settings,
            device=device,
            processes=self.processes,
            engine=engine,
            config=config,
            seed=recipe.seed,
            budget=token_budget(recipe.tokens_per_microbatch, device, config, free),
            padded=model.padded,
            quantized=recipe.quantization is not None,
            baseline=self.baseline,
        )
        workload = ledger = estimate = disk = None
        memory: dict[str, Memory] = {}
        if data.sources:
            records = self._read(stage, settings, data, base.chat)
            ledger = records.ledger.summary()
            workload = count_work(records.dataset, setup.pacing(records.parts))
        elif guess is not None:
            workload = guess_work(guess.records, guess.tokens, setup.pacing(), answers=_ANSWERS)
            notes[-1] = (  # replaces the advice
                f"guessed: {guess.records:,} records of {guess.tokens:,} tokens each, half of them "
                "trained, no prompt shared"
            )
        notes += _model_notes(model)
        if workload is not None:
            spread = not (trains_added and added)
            estimate, memory = _estimate(setup, model.shape, workload, free, spread=spread)
            sizes = {"steps": workload.steps, "records": workload.records}
            notes += unmeant(settings, **sizes, processes=self.processes)
            disk = self._disk(settings, config, model.shape, workload)
        return TrainingPlan(
            stage.name, stage.folder, ledger, setup.budget, model.shape, estimate, memory, disk,
            tuple(notes),
        )  # fmt: skip

    def _read(
        self,
        stage: PipelineStage,
        settings: TrainingSettings,
        data: PlannedData,
        chat: ChatTokenizer,
    ) -> TrainingData:
        if data.held_out is None:
            settings = settings.model_copy(update={"validation": None})
        work, trains_on = stage.stage.work, settings.trains_on
        reader = StageReader(work, trains_on, settings, chat, None, self.console)
        return reader.read(data.sources, data.held_out or (), self.recipe.seed)

    def _engine(self, settings: TrainingSettings) -> str:
        """The engine by name; raises UserError where the stage's optimizer cannot work in it."""
        engine = self.recipe.engine
        check_optimizer(settings.optimizer, pieces_of(engine), engine, self.device)
        if engine.endswith(".json"):
            stage = json.loads(Path(engine).read_text()).get("zero_optimization", {}).get("stage")
            return f"deepspeed-zero{3 if stage == 3 else 2}"
        if engine != "auto":
            return engine
        return "ddp" if self.processes > 1 else "single"

    def _disk(
        self, settings: TrainingSettings, config: Any, shape: ModelShape, work: Workload
    ) -> Disk:
        dtype = self.recipe.merge.dtype
        stored = getattr(config, "dtype", None) or torch.float32
        merged = stored if dtype == "auto" else getattr(torch, dtype)
        every = saved_every(settings, work.steps)
        return disk_of(
            shape, settings, steps=work.steps, save_steps=every, merged_bytes=merged.itemsize
        )


def _estimate(
    setup: StageSetup, shape: ModelShape, work: Workload, free: int, *, spread: bool
) -> tuple[StageEstimate, dict[str, Memory]]:
    """Estimates, and memory by engine, the chosen one first; `spread`: whether weights may be."""
    device, processes = setup.device, setup.processes
    # Bytes that a run here would take for copies of the weights in a faster order.
    copies = copied_bytes(shape, quantized=setup.quantized)
    if device.weights != torch.float32 or not copies_fit(copies, device, free):
        copies = 0
    rate = recorded_rate(setup.rate_key(shape)) or product_rate(device)
    # The first is for a single process, the others for several.
    others = tuple(SHARDS)[1:] if processes > 1 else tuple(SHARDS)[:1]
    possible = OPTIMIZERS[setup.settings.optimizer].pieces
    others = tuple(one for one in others if pieces_of(one) in possible)
    engines = (setup.engine, *(one for one in others if spread or "weights" not in SHARDS[one]))
    use = setup.memory_use(work, copies)
    return setup.estimate(shape, work, copies, rate), {
        engine: memory_of(shape, use, engine, processes) for engine in dict.fromkeys(engines)
    }


def _model_notes(model: Described) -> list[str]:
    notes = []
    if not model.reached:
        notes.append("which layers all-linear reaches is only known with weights: all are counted")
    if model.padded:
        notes.append("this model reads padded rows: nothing is shared")
    return notes
