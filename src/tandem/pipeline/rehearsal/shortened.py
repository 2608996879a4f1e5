"""The recipe of a rehearsal: the same but for what would take long, or needs another machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tandem.recipe.choices import TRAINING_STAGES
from tandem.recipe.recipe import Recipe
from tandem.recipe.training_settings import TrainingSettings

BATCH = 2  # with large vocabularies each answer costs a second
PROMPTS = 6  # that are asked for answers in a round
ROUNDS = 2  # what a third one does, the second has done
OF_THE_GPU = frozenset({"adamw_8bit"})  # optimizers that a CPU may not have
ANSWER = 16  # tokens of a generated answer
_ITEMS = 2  # of each part of an evaluation
_LONGEST_WAIT = 60.0  # for a server, in seconds
_HELD_OUT = 0.2
_LEAST_RATE = 1e-3  # of an adapter


@dataclass(frozen=True)
class Change:
    """A key of the recipe that the rehearsal sets otherwise, and why."""

    key: str
    recipe: Any
    rehearsed: Any
    why: str


@dataclass
class Shortening:
    """The values of a recipe on their way to those of its rehearsal."""

    values: dict[str, Any]
    changes: list[Change] = field(default_factory=list)
    not_shown: list[str] = field(default_factory=list)

    def section(self, key: str) -> dict[str, Any] | None:
        """The values below a dotted key; None where the recipe has none."""
        found: Any = self.values
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found if isinstance(found, dict) else None

    def put(self, key: str, value: Any, why: str, *, listed: bool = True) -> None:
        """Set a dotted key, whose section is there."""
        above, _, name = key.rpartition(".")
        section = self.values if not above else self.section(above)
        assert section is not None
        before = section.get(name)
        if before != value:
            section[name] = value
            if listed:
                self.changes.append(Change(key, before, value, why))


@dataclass(frozen=True)
class Inputs:
    """What a rehearsal puts in place of a recipe's own: models by key, data sets by key."""

    models: Mapping[str, Path]
    data: Mapping[str, list[dict[str, Any]]]
    folder: Path  # of the run
    with_servers: bool


def shortened(recipe: Recipe, inputs: Inputs, steps: int) -> tuple[Recipe, Shortening]:
    """The recipe to rehearse, with what was changed and what that leaves unseen."""
    short = Shortening(recipe.model_dump(mode="json"))
    short.put("output_dir", str(inputs.folder), "", listed=False)
    for key, folder in inputs.models.items():
        short.put(key, str(folder), "", listed=False)
    short.put("model_revision", None, "", listed=False)
    for key, sources in inputs.data.items():
        short.put(key, sources, "", listed=False)
    _machine(short)
    rounds = min(ROUNDS, recipe.rounds)
    short.put("rounds", rounds, "later rounds do what the second one does")
    for name in TRAINING_STAGES:
        if short.section(name) is not None:
            _training(short, name, getattr(recipe, name), steps)
    if short.section("pairs") is not None:
        _pairs(short, rounds, with_servers=inputs.with_servers)
    if short.section("evaluate") is not None:
        _evaluation(short, with_servers=inputs.with_servers)
    made = Recipe.model_validate_json(json.dumps(short.values), strict=True)
    return made, short


def _machine(short: Shortening) -> None:
    """Everything on the CPU, in one process."""
    values, here = short.values, "a rehearsal computes on the CPU"
    short.put("device", "cpu", here, listed=values["device"] != "auto")
    if values["dtype"] != "float32":
        short.put("dtype", "auto", "auto is float32 on a CPU")
    if values["attention"] == "varlen":
        short.put("attention", "auto", "varlen needs CUDA")
    if values["engine"] not in ("auto", "single"):
        short.not_shown.append(f"engine: {values['engine']}, and several processes")
        short.put("engine", "auto", "a rehearsal is one process")
    else:
        short.not_shown.append("several processes")
    if values["quantization"] is not None and find_spec("bitsandbytes") is None:
        short.not_shown.append(f"quantization: {values['quantization']} (bitsandbytes is not here)")
        short.put("quantization", None, "bitsandbytes is not installed here")
    if values["trackers"]:
        short.not_shown.append(f"trackers: {', '.join(values['trackers'])}, but for their login")
        short.put("trackers", [], "nothing of a rehearsal is tracked")
        for key in ("tracker_project", "tracker_run"):
            short.put(key, None, "", listed=False)
    if values["compile"]:
        short.not_shown.append("compile: true")
        short.put("compile", False, "it takes longer than all that is rehearsed")
    if values["merge"]["dtype"] not in ("auto", "float32"):
        short.put("merge.dtype", "auto", "rounding is seen with the real weights")


def _training(short: Shortening, name: str, settings: TrainingSettings, steps: int) -> None:
    """A training stage of a few small steps."""
    few = "a rehearsal takes a few small steps"
    short.put(f"{name}.epochs", None, few, listed=False)
    short.put(f"{name}.max_steps", steps, few)
    short.put(f"{name}.batch_size", min(BATCH, settings.batch_size), few)
    if settings.warmup_steps is not None:
        short.put(f"{name}.warmup_steps", min(1, settings.warmup_steps), few)
    short.put(f"{name}.logging_steps", 1, few, listed=False)
    short.put(f"{name}.save_steps", steps, few, listed=False)
    if settings.samples is not None:
        tokens = min(ANSWER, settings.samples.max_new_tokens)
        short.put(f"{name}.samples.max_new_tokens", tokens, few)
    short.put(f"{name}.max_dropped", 1.0, "judged on the sample as a whole", listed=False)
    if settings.optimizer in OF_THE_GPU:
        short.not_shown.append(f"{name}.optimizer: {settings.optimizer}")
        short.put(f"{name}.optimizer", "adamw", "its kernels are a GPU's")
    if settings.validation is not None:
        short.put(f"{name}.validation.steps", steps, few, listed=False)
        fraction = settings.validation.fraction
        if fraction is None:
            short.put(f"{name}.validation.split", None, few, listed=False)
        else:
            least = max(_HELD_OUT, fraction)
            short.put(f"{name}.validation.fraction", least, "of few records, a part must be left")
    if settings.full:
        return
    moves = "a few steps must move a random model enough for the merge to be checked"
    short.put(f"{name}.learning_rate", max(_LEAST_RATE, settings.learning_rate), moves)
    if settings.lora.start is not None:
        short.not_shown.append(f"{name}.lora.from: the adapter fits the real model alone")
        short.put(f"{name}.lora.from", None, "the adapter fits the real model alone")
    elif settings.lora.init != "zero" and settings.lora.rank > BATCH:
        short.put(f"{name}.lora.rank", BATCH, "layers of the stand-in have few dimensions")


def _pairs(short: Shortening, rounds: int, *, with_servers: bool) -> None:
    """A few prompts with short answers; what a random model writes is not filtered."""
    pairs = short.section("pairs")
    assert pairs is not None
    few = "a few prompts are asked, for short answers"
    most = PROMPTS * rounds
    short.put("pairs.select.count", min(most, pairs["select"]["count"] or most), few)
    short.put("pairs.parts", min(rounds, pairs["parts"]), few)
    short.put("pairs.samples", min(2, pairs["samples"]), few)
    short.put("pairs.max_new_tokens", min(ANSWER, pairs["max_new_tokens"]), few)
    noise = "a random model writes noise, which they would pass over"
    for key, plain in (
        ("max_similarity", None), ("drop_refusals", False), ("language", None),
        ("max_characters", None), ("drop_unfinished", False), ("check", None),
    ):  # fmt: skip
        if pairs["filters"][key] != plain:
            short.not_shown.append(f"pairs.filters.{key} on real answers")
        short.put(f"pairs.filters.{key}", plain, noise)
    if pairs["vllm"] is not None:
        short.not_shown.append("pairs.vllm: vLLM")
        short.put("pairs.vllm", None, "transformers generates on a CPU")
    if pairs["server"] is not None:
        _server(short, "pairs.server", with_servers=with_servers)
    if pairs["rank"] is not None:
        short.put("pairs.rank.margin", 0.0, noise)
        if pairs["rank"]["judge"] is not None:
            _server(short, "pairs.rank.judge", with_servers=with_servers)
        if pairs["rank"]["reward_model"] is not None:
            short.not_shown.append("the reward model's scores: a random one stands in for it")


def _server(short: Shortening, key: str, *, with_servers: bool) -> None:
    if with_servers:
        short.put(f"{key}.retries", 0, "a server that is not there is to be noticed at once")
        wait = short.section(key)
        assert wait is not None
        short.put(f"{key}.timeout", min(_LONGEST_WAIT, wait["timeout"]), "", listed=False)
    else:
        short.not_shown.append(f"{key}: the server was not asked (--without-servers)")
        short.put(key, None, "--without-servers")


def _evaluation(short: Shortening, *, with_servers: bool) -> None:
    """A few items of everything."""
    values = short.section("evaluate")
    assert values is not None
    few = "a few items of everything are measured"
    short.put("evaluate.limit", min(_ITEMS, values["limit"] or _ITEMS), few)
    short.put("evaluate.max_new_tokens", min(ANSWER, values["max_new_tokens"]), few)
    short.put("evaluate.samples", min(_ITEMS, values["samples"]), few, listed=False)
    if values["judge"] is not None:
        _server(short, "evaluate.judge", with_servers=with_servers)
