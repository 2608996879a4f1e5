"""A DeepSpeed configuration: tandem's own, or a user's that must agree with the recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.recipe.training_settings import TrainingSettings

# Keys that DeepSpeed gets unchanged; `zero_optimization` has offloading, bucket sizes, overlap.
_PASSED = {
    "aio", "comms_logger", "communication_data_type", "dump_state", "memory_breakdown",
    "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
_SECTIONS = {"bf16", "fp16", "optimizer", "scheduler", "zero_optimization"}
# Keys that must agree with the recipe.
_COMPARED = {
    "bf16", "fp16", "gradient_accumulation_steps", "gradient_clipping", "optimizer", "scheduler",
    "train_batch_size", "train_micro_batch_size_per_gpu",
}  # fmt: skip
_OPTIMIZERS = {"adamw": ("Adam", "AdamW"), "lion": ("Lion",)}
_SCHEDULERS = {
    "WarmupCosineLR": ("cosine",),
    "WarmupDecayLR": ("linear",),
    "WarmupLR": ("constant", "constant_with_warmup"),
}


def own_config(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe that only names a stage."""
    return _for_deepspeed({"zero_optimization": {"stage": stage}})


def read_config(
    path: Path, settings: TrainingSettings, dtype: str, processes: int
) -> dict[str, Any]:
    """A user's DeepSpeed configuration (a JSON file), which must agree with the recipe.

    Batch sizes, clipping, precision, optimizer and schedule are the recipe's; the file may leave
    them out, say `auto`, or say the same.

    Raises UserError for a file that cannot be read, keys that would do nothing, and conflicts,
    naming both values.
    """
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"engine: {path} cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"engine: {path} is no DeepSpeed configuration: not a JSON object")
    for key in _SECTIONS & config.keys():
        if not isinstance(config[key], dict):
            raise UserError(f"engine: {path}: {key} is {config[key]!r}, but it must be an object")
    if unknown := sorted(config.keys() - _PASSED - _COMPARED):
        raise UserError(
            f"engine: {path}: tandem has no use for {', '.join(unknown)}; remove "
            f"{'it' if len(unknown) == 1 else 'them'}. It takes "
            f"{', '.join(sorted(_PASSED | _COMPARED))}."
        )
    conflicts = [
        *_batch_conflicts(config, settings.batch_size, processes),
        *_precision_conflicts(config, settings.max_grad_norm, dtype),
        *_optimizer_conflicts(config.get("optimizer", {}), settings),
        *_scheduler_conflicts(config.get("scheduler", {}), settings),
    ]
    if conflicts:
        raise UserError(
            f"engine: {path} and the recipe contradict each other:\n"
            + "\n".join(f"  {line}" for line in conflicts)
            + '\nMake them equal, or write "auto" in the file.'
        )
    if config.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
        raise UserError(
            f"engine: {path}: zero_optimization.stage must be 1, 2 or 3; for training without ZeRO "
            "say engine: ddp"
        )
    return _for_deepspeed({key: config[key] for key in config.keys() & _PASSED})


def _for_deepspeed(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        # tandem makes the micro-batches; DeepSpeed sees steps, or sums that are divided already.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        # tandem's AdamW is used even where its state is on the CPU.
        "zero_force_ds_cpu_optimizer": False,
        **config,
        # Else DeepSpeed refuses optimizers that it does not know.
        "zero_allow_untested_optimizer": True,
    }


def _batch_conflicts(config: Mapping[str, Any], batch_size: int, processes: int) -> Iterator[str]:
    total = config.get("train_batch_size", "auto")
    if total not in ("auto", batch_size):
        yield f"train_batch_size {total}, batch_size {batch_size}"
    keys = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    factors = {key: config[key] for key in keys if config.get(key, "auto") != "auto"}
    if any(not isinstance(factor, int) or factor < 1 for factor in factors.values()):
        yield f"{_listed(factors)}, which must be whole numbers above 0"
        return
    product = math.prod(factors.values()) * processes
    fits = product == batch_size if len(factors) == 2 else not batch_size % product
    if factors and not fits:
        yield f"{_listed(factors)} x {processes} processes = {product}, batch_size {batch_size}"


def _precision_conflicts(
    config: Mapping[str, Any], max_grad_norm: float | None, dtype: str
) -> Iterator[str]:
    for key, wanted in (("bf16", "bfloat16"), ("fp16", "float16")):
        enabled = config.get(key, {}).get("enabled", "auto")
        if enabled != "auto" and bool(enabled) != (dtype == wanted):
            yield f"{key}.enabled {str(enabled).lower()}, dtype {dtype}"
    clipping = config.get("gradient_clipping", "auto")
    if clipping not in ("auto", max_grad_norm or 0.0):
        yield f"gradient_clipping {clipping}, max_grad_norm {max_grad_norm}"


def _listed(factors: Mapping[str, Any]) -> str:
    return " x ".join(f"{key} {factor}" for key, factor in factors.items())


def _optimizer_conflicts(optimizer: Mapping[str, Any], settings: TrainingSettings) -> Iterator[str]:
    kind, own = optimizer.get("type"), settings.optimizer
    if kind is not None and kind not in _OPTIMIZERS.get(own, ()):
        yield f"optimizer.type {kind}, optimizer {own}"
    recipe: dict[str, tuple[str, Any]] = {
        "lr": ("learning_rate", settings.learning_rate),
        "weight_decay": ("weight_decay", settings.weight_decay),
    }
    if own == "lion":
        recipe["betas"] = ("lion_beta1, lion_beta2", [settings.lion_beta1, settings.lion_beta2])
    else:
        recipe["betas"] = ("adam_beta1, adam_beta2", [settings.adam_beta1, settings.adam_beta2])
        recipe["eps"] = ("adam_epsilon", settings.adam_epsilon)
    yield from _differences("optimizer.params", optimizer.get("params", {}), recipe)


def _scheduler_conflicts(scheduler: Mapping[str, Any], settings: TrainingSettings) -> Iterator[str]:
    kind = scheduler.get("type")
    if kind is not None and settings.lr_scheduler not in _SCHEDULERS.get(kind, ()):
        yield f"scheduler.type {kind}, lr_scheduler {settings.lr_scheduler}"
    if kind == "WarmupDecayLR" and settings.min_lr_ratio:
        yield f"scheduler.type {kind}, which falls to 0, min_lr_ratio {settings.min_lr_ratio}"
    recipe: dict[str, tuple[str, Any]] = {
        "warmup_max_lr": ("learning_rate", settings.learning_rate),
        "warmup_min_lr": ("warm-up from", 0),
        "warmup_type": ("warm-up", "linear"),
        "cos_min_ratio": ("min_lr_ratio", settings.min_lr_ratio),
        "warmup_num_steps": ("warmup_steps", settings.warmup_steps),
        "total_num_steps": ("max_steps", settings.max_steps),
    }
    yield from _differences("scheduler.params", scheduler.get("params", {}), recipe)


def _differences(
    place: str, params: Mapping[str, Any], recipe: Mapping[str, tuple[str, Any]]
) -> Iterator[str]:
    for key, value in params.items():
        name, wanted = recipe.get(key, (None, None))
        if name is None:
            yield f"{place}.{key} {value}, which no key of the recipe sets"
        elif value not in ("auto", wanted):
            yield f"{place}.{key} {value}, {name} {wanted}"
