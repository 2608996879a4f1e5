"""`tandem plan`: what a recipe's stages would do and take, without weights and without training."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tandem.data.ledger import Ledger
from tandem.data.prepare import prepare_conversations, prepare_pairs
from tandem.data.sources import SourceSpec, looks_like_path
from tandem.data.template import ChatTemplate
from tandem.data.trees import Trees
from tandem.errors import UserError
from tandem.estimate.history import Setting
from tandem.estimate.memory import ENGINES, Disk, Memory, disk_of, memory_of
from tandem.estimate.shape import ModelShape, described
from tandem.estimate.work import Work, count_work, guess_work
from tandem.model.load import model_folder
from tandem.pairs.output import made_pairs
from tandem.pairs.prompts import Prompt
from tandem.recipe.schema import Recipe
from tandem.recipe.section import DataSource
from tandem.recipe.training import Sft, Training
from tandem.stages.forecast import Forecast, asked_of, forecast, held_by, ordered_bytes
from tandem.stages.inputs import model_side
from tandem.stages.pipeline import PlannedStage, describe_pipeline
from tandem.stages.prompts import asked_prompts
from tandem.stages.records import Records, stage_records
from tandem.stages.sources import held_out_sources, source_specs
from tandem.train.device import Device, choose_device, token_budget

# Of a pair's or conversation's tokens, the trained ones, where nobody has seen the data.
_ANSWERS = 0.5
# Of the free memory, what copies of the weights in a faster order may take; see `schedule`.
_COPIES_SHARE = 0.25
_PREPARE: dict[str, Callable[..., Trees]] = {"sft": prepare_conversations, "dpo": prepare_pairs}


@dataclass(frozen=True)
class Guess:
    """What is taken for data that is not here: how many records, and tokens of each."""

    records: int
    tokens: int


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
        notes: what is missing, guessed or left out.
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
    stages: tuple[PlannedStage, ...]
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
    not fit it, and data that training would refuse.
    """
    device = choose_device(recipe.device, recipe.dtype)
    base = model_folder(recipe.model, recipe.model_revision, weights=False)
    planned = describe_pipeline(recipe)
    with tempfile.TemporaryDirectory(prefix="tandem-plan-") as scratch:
        planner = _Planner(recipe, processes, download, console, device, base, Path(scratch))
        sections = {"sft": recipe.sft, "dpo": recipe.dpo}
        wanted = [(stage, settings) for stage in planned if (settings := sections.get(stage.name))]
        trained = [
            planner.stage(
                stage, settings, guesses[min(number, len(guesses) - 1)] if guesses else None
            )
            for number, (stage, settings) in enumerate(wanted)
        ]
    return Plan(device.kind, device.dtype_name, processes, tuple(planned), tuple(trained))


@dataclass(frozen=True)
class _Data:
    """A stage's data as far as it is here."""

    sources: Sequence[SourceSpec]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Planner:
    """One recipe on this machine, and a folder for what is only needed meanwhile."""

    recipe: Recipe
    processes: int
    download: bool
    console: Console
    device: Device
    base: Path
    scratch: Path

    def stage(self, stage: PlannedStage, settings: Training, guess: Guess | None) -> StagePlan:
        """The plan of one training stage."""
        recipe, device = self.recipe, self.device
        config, tokenizer, template, _ = model_side(
            self.base, settings, recipe.chat_template, recipe.added_tokens, weights=False
        )
        lora = settings.lora
        model = described(
            config,
            rank=lora.rank,
            alpha=lora.alpha,
            target_modules=lora.target_modules,
            attention=recipe.attention,
        )
        baseline = device.held_memory()
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
        data = self._data(stage, settings)
        ledger, work = None, None
        if data.sources:
            records = self._records(stage, settings, data.sources, tokenizer, template)
            ledger = records.ledger.summary()
            work = count_work(records.trees, replace(asked, parts=records.parts))
        elif guess is not None:
            work = guess_work(guess.records, guess.tokens, asked, answers=_ANSWERS)
            data.notes.append(
                f"guessed: {guess.records:,} records of {guess.tokens:,} tokens each, half of them "
                "trained, no prompt shared"
            )
        else:
            data.notes.append(
                "steps, time and memory follow from it: --download fetches and reads it, --records "
                "N --tokens-per-record M plans without it"
            )
        if not model.reached:
            data.notes.append(
                "which layers all-linear reaches is only known with weights: all are counted"
            )
        if model.padded:
            data.notes.append("this model reads padded rows: nothing is shared")
        made, disk = None, None
        memory: dict[str, Memory] = {}
        if work is not None:
            made, memory = self._forecast(stage, settings, config, model.shape, work, baseline)
            disk = self._disk(settings, config, model.shape, work)
        return StagePlan(
            stage.name, stage.folder, ledger, budget, model.shape, made, memory, disk,
            tuple(data.notes),
        )  # fmt: skip

    def _records(
        self,
        stage: PlannedStage,
        settings: Training,
        sources: Sequence[SourceSpec],
        tokenizer: Any,
        template: ChatTemplate,
    ) -> Records:
        prepare = _PREPARE[stage.name]
        if isinstance(settings, Sft):
            prepare = partial(prepare, loss_on=settings.loss_on)
        return stage_records(
            prepare,
            sources,
            held_out_sources(settings, sources, self.scratch, self.recipe.seed),
            settings,
            tokenizer=tokenizer,
            template=template,
            folder=None,
            name=stage.name,
            seed=self.recipe.seed,
            console=self.console,
        )

    def _data(self, stage: PlannedStage, settings: Training) -> _Data:
        """The stage's sources, none where they are not here, and what to say about that."""
        if stage.name == "dpo" and not settings.data:
            return self._pairs()
        return self._sources(settings.data)

    def _sources(self, wanted: Sequence[DataSource]) -> _Data:
        """Sources that are here; the whole stage is guessed when one of them is not."""
        away = [s.path for s in wanted if not _is_here(s.path)]
        if away and not self.download:
            return _Data(
                (),
                [f"{', '.join(away)}: on the Hub, and not read"],
            )
        return _Data(source_specs(wanted, self.scratch, self.recipe.seed))

    def _pairs(self) -> _Data:
        """What the pairs stage has made, or pairs as its prompts let one expect."""
        settings = self.recipe.pairs
        assert settings is not None
        stages = {stage.name: stage for stage in describe_pipeline(self.recipe)}
        made = made_pairs(stages["pairs"].folder)
        if made is not None:
            return _Data([SourceSpec(str(made))], [f"pairs: those of {made}"])
        prompts = self._sources(settings.prompts)
        if not prompts.sources:
            return prompts
        evaluated = settings.select.decontaminate
        asked, _ = asked_prompts(
            prompts.sources,
            source_specs(evaluated, self.scratch, self.recipe.seed),
            settings,
            self.recipe.seed,
            Ledger(None),
        )
        if not asked:
            raise UserError(f"pairs: none of the records of {settings.prompts} can be asked")
        guessed = self.scratch / "guessed-pairs.jsonl"
        rows = (json.dumps(_guessed(prompt), ensure_ascii=False) + "\n" for prompt in asked)
        guessed.write_text("".join(rows), encoding="utf-8")
        return _Data(
            [SourceSpec(str(guessed))],
            [
                f"guessed: the pairs are not made yet. Taken are {len(asked)} prompts, with "
                "rejected answers as long as the chosen ones"
            ],
        )

    def _forecast(
        self,
        stage: PlannedStage,
        settings: Training,
        config: Any,
        shape: ModelShape,
        work: Work,
        baseline: int,
    ) -> tuple[Forecast, dict[str, Memory]]:
        device = self.device
        engine = self._engine()
        copies = ordered_bytes(shape)
        fits = device.is_host and device.weights == torch.float32
        fits = fits and copies <= device.free_memory() * _COPIES_SHARE / self.processes
        held = held_by(
            settings,
            work,
            device=device,
            config=config,
            quantization=self.recipe.quantization,
            copies=copies if fits else 0,
            baseline=baseline,
        )
        setting = Setting(
            stage.name, device.kind, device.dtype_name, shape.parameters, self.processes, engine
        )
        made = forecast(shape, work, settings, setting, device=device, held=held)
        # A single process has but one way.
        engines = ENGINES[1:] if self.processes > 1 else ENGINES[:1]
        return made, {
            name: memory_of(shape, held, name, self.processes)
            for name in dict.fromkeys((engine, *engines))
        }

    def _engine(self) -> str:
        engine = self.recipe.engine
        if engine.endswith(".json"):
            stage = json.loads(Path(engine).read_text()).get("zero_optimization", {}).get("stage")
            return f"deepspeed-zero{3 if stage == 3 else 2}"
        if engine != "auto":
            return engine
        return "ddp" if self.processes > 1 else "single"

    def _disk(self, settings: Training, config: Any, shape: ModelShape, work: Work) -> Disk:
        dtype = self.recipe.merge.dtype
        stored = getattr(config, "dtype", None) or torch.float32
        merged = stored if dtype == "auto" else getattr(torch, dtype)
        return disk_of(
            shape,
            steps=work.steps,
            save_steps=settings.save_steps or max(1, -(-work.steps // 10)),
            keep=settings.save_total_limit,
            merged_bytes=merged.itemsize,
        )


def _is_here(path: str) -> bool:
    return path.startswith("demo:") or looks_like_path(path)


def _guessed(prompt: Prompt) -> dict[str, str]:
    """A pair in orca_dpo_pairs' form: the answer's own words in another order are rejected."""
    words = prompt.answer.split(" ")
    rejected = " ".join(reversed(words))
    return {
        "system": prompt.system,
        "question": prompt.question,
        "chosen": prompt.answer,
        "rejected": rejected if rejected != prompt.answer else f"{rejected} {rejected}",
    }
