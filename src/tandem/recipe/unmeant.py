"""Warnings of training settings that have no sensible effect."""

from __future__ import annotations

import math

from tandem.losses.known import known_losses
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.training_settings import TrainingSettings

# AdamW moves a weight by about the learning rate in each step. The weights of models and adapters
# are a few hundredths large: one step of this size overwrites them.
_HUGE_RATE = 0.1
# A larger share of the untrained weights in a moving average is no average of what was trained.
_OF_THE_START = 0.5


def unmeant(
    settings: TrainingSettings, *, steps: int | None, records: int | None, processes: int = 1
) -> list[str]:
    """Return a sentence on each setting that has no sensible effect.

    `steps` are those of the whole run and `records` those that are trained on, None while unknown.
    """
    warnings = []
    ratio = max(1.0, settings.lora.plus_ratio)
    if settings.learning_rate * ratio >= _HUGE_RATE:
        times = f" times lora.plus_ratio {ratio:g}" if ratio > 1 else ""
        warnings.append(
            f"learning_rate {settings.learning_rate:g}{times} is larger than the weights "
            "themselves; usual ones are between 1e-6 and 1e-3"
        )
    if isinstance(settings, DpoSettings):
        warnings += _unusual_beta(settings)
    if records is not None and settings.batch_size > records:
        warnings.append(
            f"batch_size {settings.batch_size} is more than the {records} records that there are: "
            f"each step takes these {records}, and is an epoch"
        )
    if settings.batch_size < processes:
        warnings.append(
            f"batch_size {settings.batch_size} is less than the {processes} processes: some have "
            "nothing to do in a step"
        )
    return warnings if steps is None else [*warnings, *_beyond(settings, steps)]


def _unusual_beta(settings: DpoSettings) -> list[str]:
    """Return a sentence on a `beta` that is meant for other losses."""
    warnings = []
    for loss in known_losses(settings.losses):
        about, name = loss.about, loss.name
        if about is None or about.usual_beta is None or "beta" not in loss.options:
            continue
        low, high = about.usual_beta
        if not low <= settings.beta <= high:
            warnings.append(
                f"beta {settings.beta:g} is unusual with loss {name}, where it is between {low:g} "
                f"and {high:g}"
            )
    return warnings


def _beyond(settings: TrainingSettings, steps: int) -> list[str]:
    """Return a sentence on each setting whose number of steps the run does not reach."""
    run = f"the run's {steps} step{'s' if steps != 1 else ''}"
    warnings = []
    warm_up = settings.warmup_steps
    if warm_up is None:
        warm_up = math.ceil(steps * (settings.warmup_ratio or 0.0))
    if warm_up and warm_up >= steps:
        reached = settings.learning_rate * (steps - 1) / warm_up
        named = "warmup_ratio" if settings.warmup_steps is None else f"warmup_steps {warm_up}"
        warnings.append(
            f"{named}: the warm-up of {warm_up} is as long as {run} or longer: the learning rate "
            f"only rises, to {reached:.2g} of {settings.learning_rate:g}"
        )
    fall = math.ceil(steps * settings.decay_ratio) if settings.lr_scheduler == "wsd" else 0
    if fall and warm_up < steps < warm_up + fall:
        warnings.append(
            f"lr_scheduler: wsd: warm-up ({warm_up}) and fall ({fall}) are longer than {run} "
            f"together: the fall begins after the warm-up, in {steps - warm_up} steps"
        )
    if settings.ema_decay is not None and (kept := settings.ema_decay**steps) > _OF_THE_START:
        warnings.append(
            f"ema_decay {settings.ema_decay:g}: after {run} the average is still {kept:.0%} of the "
            f"untrained weights; with {0.05 ** (1 / steps):.3g} it is 5%"
        )
    if settings.logging_steps > steps:
        warnings.append(
            f"logging_steps {settings.logging_steps} is more than {run}: metrics are logged once, "
            "at the end, and there is no curve"
        )
    if settings.save_steps is not None and settings.save_steps > steps:
        warnings.append(
            f"save_steps {settings.save_steps} is more than {run}: there is no checkpoint before "
            "the end, and a stopped run starts over"
        )
    scored = None if settings.validation is None else settings.validation.steps
    if scored is not None and scored > steps:
        warnings.append(
            f"validation.steps {scored} is more than {run}: held-out records are scored only "
            "before the first step and at the end"
        )
    return warnings + _never_early(settings, steps)


def _never_early(settings: TrainingSettings, steps: int) -> list[str]:
    """Return a sentence on an early stopping that comes after the last step."""
    early, validation = settings.early_stopping, settings.validation
    if early is None or validation is None:
        return []
    every = validation.steps or math.ceil(steps / 10)
    scores = math.ceil(steps / every)
    if early.patience < scores:
        return []
    return [
        f"early_stopping.patience {early.patience} is not reached: the run has {scores} "
        f"score{'s' if scores != 1 else ''} after its steps, and the first is what others must "
        "improve on"
    ]
