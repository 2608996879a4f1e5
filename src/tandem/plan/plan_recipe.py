"""`tandem plan`: what a recipe's stages would do and take, without weights and without training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.formats.format import Kind
from tandem.errors import TandemError
from tandem.integrations.choose import choose_device
from tandem.model.added_tokens import check_added
from tandem.model.base_model import BaseModelInfo, check_base, load_base_info
from tandem.model.model_folder import model_folder
from tandem.plan.available_data import DataHere, Guess, PlannedData, check_guesses, guess_for
from tandem.plan.history import Setting
from tandem.plan.memory_estimate import Disk, Memory, disk_of, memory_of
from tandem.plan.model_shape import Described, ModelShape, described
from tandem.plan.rate import Rate, product_rate, recorded_rate
from tandem.plan.stage_estimate import Forecast, asked_of, copied_bytes, forecast, held_by
from tandem.plan.trial import Trial, made_up
from tandem.plan.workload import Asked, Work, count_work, guess_work
from tandem.recipe.choices import SHARDS
from tandem.recipe.recipe import PipelineStage, Recipe, stages_of
from tandem.recipe.training_settings import TrainingSettings, unmeant
from tandem.runtime.device import Device
from tandem.stages.training.execution import copies_fit
from tandem.stages.training.trainer_setup import saved_every
from tandem.stages.training.training_data import StageReader, TrainingData
from tandem.train.token_budget import token_budget

# Of a pair's or conversation's tokens, the trained ones, where nobody has seen the data.
_ANSWERS = 0.5
# Seconds that a pass of a trial may be expected to take at a product's rate.
_PASS = 3.0
_KINDS: dict[str, Kind] = {"sft": "conversations", "dpo": "preference pairs"}


@dataclass(frozen=True)
class StagePlan:
    """What one training stage would do and take.

    Attributes:
        name, folder: the stage and where it writes.
        ledger: counts of its records, None where they were not read.
        budget: tokens of a micro-batch.
        shape: of the model with its adapter.
        forecast: work, operations, memory and time; None where nothing is known of the data.
        memory: of one process by engine, where the work is known.
        disk: what it and its merge leave, where the work is known.
        notes: what is missing, guessed or left out, or has failed.
    """

    name: str
    folder: Path
    ledger: dict[str, Any] | None
    budget: int
    shape: ModelShape
    forecast: Forecast | None
    memory: dict[str, Memory]
    disk: Disk | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A recipe's plan on this machine: its training stages, and a line on each other one."""

    device: str
    dtype: str
    processes: int
    stages: tuple[PipelineStage, ...]
    trained: tuple[StagePlan, ...]


def plan_recipe(
    recipe: Recipe,
    *,
    processes: int,
    download: bool,
    guesses: Sequence[Guess] = (),
    console: Console,
) -> Plan:
    """Plan every training stage of a recipe.

    Args:
        recipe: the resolved recipe; of its model only configuration and tokenizer are needed.
        processes: in how many it would run.
        download: whether data sets of the Hub may be fetched.
        guesses: what is taken for data that is not here, by training stage; the last is for all
            that follow.
        console: for progress.

    Raises UserError for a model without configuration or tokenizer, an adapter or limits that do
    not fit it, data that training would refuse, and guesses that nothing would come of.
    """
    device = choose_device(recipe.device, recipe.dtype)
    planned = stages_of(recipe)
    with tempfile.TemporaryDirectory(prefix="tandem-plan-") as scratch:
        sections = {"sft": recipe.sft, "dpo": recipe.dpo}
        wanted = [(stage, settings) for stage in planned if (settings := sections.get(stage.name))]
        here = DataHere(recipe, download, Path(scratch))
        data = [here.of(settings) for _, settings in wanted]
        longest = {str(stage.name): settings.max_length for stage, settings in wanted}
        check_guesses(guesses, longest, data)
        base = model_folder(recipe.model, recipe.model_revision, weights=False)
        check_base(base, {stage.name: settings for stage, settings in wanted}, weights=False)
        baseline = device.held_memory()
        planner = _Planner(recipe, processes, console, device, base, baseline)
        trained = [
            planner.stage(stage, settings, found, guess_for(guesses, number))
            for number, ((stage, settings), found) in enumerate(zip(wanted, data, strict=True))
        ]
    return Plan(device.kind, device.dtype_name, processes, tuple(planned), tuple(trained))


@dataclass(frozen=True)
class _Known:
    """Records and the work that they make.

    Attributes:
        asked: how the stage goes through them.
        trees: encoded; a few made-up ones where they are guessed.
        work: counted.
        ledger: counts of what was read, None where they are guessed.
    """

    asked: Asked
    dataset: EncodedDataset
    work: Work
    ledger: dict[str, Any] | None


def _read(records: TrainingData, asked: Asked) -> _Known:
    asked = replace(asked, parts=records.parts)
    work = count_work(records.dataset, asked)
    return _Known(asked, records.dataset, work, records.ledger.summary())


def _taken(guess: Guess, asked: Asked, vocabulary: int) -> _Known:
    work = guess_work(guess.records, guess.tokens, asked, answers=_ANSWERS)
    dataset = made_up(guess.records, guess.tokens, _ANSWERS, vocabulary)
    return _Known(asked, dataset, work, None)


def _notes(data: PlannedData, guess: Guess | None, model: Described) -> tuple[str, ...]:
    """What is missing, guessed or left out."""
    notes = list(data.notes)
    if not data.sources and guess is not None:
        notes.append(
            f"guessed: {guess.records:,} records of {guess.tokens:,} tokens each, half of them "
            "trained, no prompt shared"
        )
    elif not data.sources:
        notes.append(
            "steps, time and memory follow from it: --download fetches and reads it, --records "
            "N --tokens-per-record M plans without it"
        )
    if not model.reached:
        notes.append("which layers all-linear reaches is only known with weights: all are counted")
    if model.padded:
        notes.append("this model reads padded rows: nothing is shared")
    return tuple(notes)


@dataclass(frozen=True)
class _Planner:
    """One recipe on this machine, and what the process holds before any model."""

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
    ) -> StagePlan:
        """The plan of one training stage."""
        recipe, device = self.recipe, self.device
        base = load_base_info(recipe, self.base, settings.max_length, weights=False)
        config, added = base.config, base.added
        # An SFT before it leaves them in the merged model.
        trains_added = stage.name == "sft" or recipe.sft is None
        if trains_added:
            engine = self._engine()
            check_added(
                {*added.new, *added.known}, engine=engine, sharded="weights" in SHARDS[engine]
            )
        lora = settings.lora
        model = described(
            config,
            rank=lora.rank,
            alpha=lora.alpha,
            target_modules=lora.target_modules,
            attention=recipe.attention,
            added=added,
            trains_added=trains_added,
        )
        # Where the run will ask, the model is loaded; on CPU processes share what is free.
        free = device.free_memory() // (self.processes if device.is_host else 1)
        free -= model.shape.parameters * device.weights.itemsize
        budget = token_budget(recipe.tokens_per_microbatch, device, config, free)
        asked = asked_of(
            settings,
            seed=recipe.seed,
            budget=budget,
            processes=self.processes,
            config=config,
            padded=model.padded,
        )
        known = None
        if data.sources:
            known = _read(
                self._records(stage, settings, data, base),
                asked,
            )
        elif guess is not None:
            known = _taken(guess, asked, int(config.get_text_config().vocab_size))
        if trains_added:
            data = replace(data, notes=(*base.warnings(), *data.notes))
        made, disk = None, None
        memory: dict[str, Memory] = {}
        notes = _notes(data, guess, model)
        if known is not None:
            trial = Trial(
                config=config,
                shape=model.shape,
                settings=settings,
                device=device,
                attention=recipe.attention,
                dropout=stage.name == "sft",
                copies=self._copies(model.shape, free),
                added=added,
                trains_added=trains_added,
            )
            made, memory, failed = self._forecast(stage, trial, known)
            count = guess.records if guess is not None else len(known.dataset)
            count = len(known.dataset) if known.ledger is not None else count
            doubts = unmeant(
                settings, steps=known.work.steps, records=count, processes=self.processes
            )
            notes += (*failed, *doubts)
            disk = self._disk(settings, config, model.shape, known.work)
        ledger = None if known is None else known.ledger
        return StagePlan(
            stage.name, stage.folder, ledger, budget, model.shape, made, memory, disk,
            notes,
        )  # fmt: skip

    def _records(
        self,
        stage: PipelineStage,
        settings: TrainingSettings,
        data: PlannedData,
        base: BaseModelInfo,
    ) -> TrainingData:
        if data.held_out is None:
            settings = settings.model_copy(update={"validation": None})
        reader = StageReader(
            stage.name, _KINDS[stage.name], settings, base.chat, None, self.console
        )
        return reader.read(data.sources, data.held_out or (), self.recipe.seed)

    def _copies(self, shape: ModelShape, free: int) -> int:
        """What a run here would take for copies of the weights in a faster order."""
        device = self.device
        copies = copied_bytes(shape, quantized=self.recipe.quantization is not None)
        fits = device.weights == torch.float32 and copies_fit(copies, device, free)
        return copies if fits else 0

    def _forecast(
        self, stage: PipelineStage, trial: Trial, known: _Known
    ) -> tuple[Forecast, dict[str, Memory], tuple[str, ...]]:
        """Estimates, memory by engine, and notes."""
        device, shape, settings = self.device, trial.shape, trial.settings
        engine = self._engine()
        held = held_by(
            settings,
            known.work,
            device=device,
            config=trial.config,
            quantization=self.recipe.quantization,
            copies=trial.copies,
            baseline=self.baseline,
        )
        setting = Setting(
            stage.name, device.kind, device.dtype_name, shape.parameters, self.processes, engine
        )
        rate, failed = self._rate(setting, trial, known)
        made = forecast(
            shape, known.work, settings, setting, host=device.is_host, held=held, rate=rate
        )
        # A single process has but one way.
        every = tuple(SHARDS)
        engines = every[1:] if self.processes > 1 else every[:1]
        if trial.added and trial.trains_added:
            engines = tuple(name for name in engines if "weights" not in SHARDS[name])
        memory = {
            name: memory_of(shape, held, name, self.processes)
            for name in dict.fromkeys((engine, *engines))
        }
        return made, memory, failed

    def _rate(self, setting: Setting, trial: Trial, known: _Known) -> tuple[Rate, tuple[str, ...]]:
        """From the last run that is alike; a trial says more than a brief one. And notes."""
        device, recorded = self.device, recorded_rate(setting)
        last = recorded.measured if recorded else None
        if recorded and last and not last.brief:
            return recorded, ()
        product = product_rate(device.torch_device, device.weights, device.synchronize)
        tried = None
        failed: tuple[str, ...] = ()
        if self.recipe.quantization is None:
            try:
                tried = trial.rate(known.dataset, known.asked, most=_PASS * product.operations)
            except TandemError:
                raise
            except Exception as error:  # whatever a strange model leads to, a plan can do without
                failed = (
                    f"the trial that tells its time failed ({type(error).__name__}: {error})",
                )
        if tried is not None:
            return replace(tried, measured=last), ()
        return recorded or product, failed

    def _engine(self) -> str:
        engine = self.recipe.engine
        if engine.endswith(".json"):
            stage = json.loads(Path(engine).read_text()).get("zero_optimization", {}).get("stage")
            return f"deepspeed-zero{3 if stage == 3 else 2}"
        if engine != "auto":
            return engine
        return "ddp" if self.processes > 1 else "single"

    def _disk(self, settings: TrainingSettings, config: Any, shape: ModelShape, work: Work) -> Disk:
        dtype = self.recipe.merge.dtype
        stored = getattr(config, "dtype", None) or torch.float32
        merged = stored if dtype == "auto" else getattr(torch, dtype)
        return disk_of(
            shape,
            steps=work.steps,
            save_steps=saved_every(settings, work.steps),
            keep=settings.save_total_limit,
            merged_bytes=merged.itemsize,
        )
