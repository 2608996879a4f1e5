"""What a shipped recipe takes on a GPU, by the code of `tandem plan`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tandem.plan.model_shape import ModelShape, described
from tandem.plan.stage_estimate import Memory, StageSetup, memory_of
from tandem.plan.workload import guess_work
from tandem.recipe.choices import SHARDS
from tandem.recipe.recipe import Recipe
from tandem.recipe.training_settings import LoraSettings, TrainingSettings
from tandem.runtime.device import Device
from tandem.train.token_budget import token_budget

from .shipped_models import config_of


def shape_of(model: str, lora: LoraSettings | None) -> ModelShape:
    """The shape of a model with its adapter, from two and three of its layers, which are alike.

    To put an adapter on all of them takes a second for each recipe.
    """
    two, three = (described(_of_layers(model, n), lora, attention="auto").shape for n in (2, 3))
    depth = int(config_of(model).get_text_config().num_hidden_layers)
    alike = {"full", "head", "largest_layer", "hidden"}
    grown = {
        key: value if key in alike else value + (depth - 2) * (getattr(three, key) - value)
        for key, value in vars(two).items()
    }
    return replace(two, **grown)


def _of_layers(model: str, count: int) -> Any:
    config = config_of(model)
    text = config.get_text_config()
    text.num_hidden_layers = count
    for key in ("layer_types", "no_rope_layers"):
        if getattr(text, key, None):
            setattr(text, key, getattr(text, key)[:count])
    return config


def planned(recipe: Recipe, *, card: float, processes: int) -> dict[str, Memory]:
    """The memory of one process in each training stage, with records as long as they may be.

    `card` is the memory of a GPU in bytes. Both answers of a pair are as long as they may be, too,
    and share nothing.
    """
    config = config_of(recipe.model)
    device = Device(torch.device("cuda"), torch.bfloat16)
    stages: dict[str, TrainingSettings | None] = {"sft": recipe.sft, "dpo": recipe.dpo}
    found = {}
    for name, settings in stages.items():
        if settings is None:
            continue
        lora = None if settings.full else settings.lora
        shape = shape_of(recipe.model, lora)
        engine = recipe.engine
        if engine == "auto":
            engine = "ddp" if processes > 1 else "single"
        share = processes if "weights" in SHARDS[engine] else 1
        free = int(card - shape.parameters * 2 / share)
        setup = StageSetup(
            name, settings, device, processes, engine, config, recipe.seed,
            token_budget(recipe.tokens_per_microbatch, device, config, free),
            padded=False, quantized=recipe.quantization is not None, baseline=0,
        )  # fmt: skip
        tokens = settings.max_length * (1 if name == "sft" else 2)
        work = guess_work(10_000, tokens, setup.pacing(), answers=0.5)
        found[name] = memory_of(shape, setup.memory_use(work, 0), engine, processes)
    return found
