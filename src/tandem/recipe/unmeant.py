"""Settings that are allowed, but cannot do what they are for: reported before the first step."""

from __future__ import annotations

import math

from tandem.recipe.training_settings import TrainingSettings

# AdamW moves a weight by about the learning rate in each step. The weights of models and adapters
# are a few hundredths large: one step of this size overwrites them.
_HUGE_RATE = 0.1


def unmeant(
    settings: TrainingSettings, *, steps: int | None, records: int | None, processes: int = 1
) -> list[str]:
    """A sentence on each setting that will not do what it is there for.

    Args:
        settings: of a training stage.
        steps: optimizer steps of the whole run; None where they are not known yet.
        records: that are trained on; None where they are not known yet.
        processes: that share the work.
    """
    found = []
    if settings.learning_rate >= _HUGE_RATE:
        found.append(
            f"learning_rate {settings.learning_rate:g} is more than the weights are large; usual "
            "ones are between 1e-6 and 1e-3"
        )
    if records is not None and settings.batch_size > records:
        found.append(
            f"batch_size {settings.batch_size} is more than the {records} records that there are: "
            f"each step takes these {records}, and is an epoch"
        )
    if settings.batch_size < processes:
        found.append(
            f"batch_size {settings.batch_size} is less than the {processes} processes: some have "
            "nothing to do in a step"
        )
    return found if steps is None else [*found, *_beyond(settings, steps)]


def _beyond(settings: TrainingSettings, steps: int) -> list[str]:
    """What is to happen after so many steps, in a run that has fewer."""
    run = f"the run's {steps} step{'s' if steps != 1 else ''}"
    found = []
    warm_up = settings.warmup_steps
    if warm_up is None:
        warm_up = math.ceil(steps * (settings.warmup_ratio or 0.0))
    if warm_up and warm_up >= steps:
        reached = settings.learning_rate * (steps - 1) / warm_up
        named = "warmup_ratio" if settings.warmup_steps is None else f"warmup_steps {warm_up}"
        found.append(
            f"{named}: the warm-up of {warm_up} is as long as {run} or longer: the learning rate "
            f"only rises, to {reached:.2g} of {settings.learning_rate:g}"
        )
    if settings.logging_steps > steps:
        found.append(
            f"logging_steps {settings.logging_steps} is more than {run}: metrics are logged once, "
            "at the end, and there is no curve"
        )
    if settings.save_steps is not None and settings.save_steps > steps:
        found.append(
            f"save_steps {settings.save_steps} is more than {run}: there is no checkpoint before "
            "the end, and a stopped run begins anew"
        )
    scored = None if settings.validation is None else settings.validation.steps
    if scored is not None and scored > steps:
        found.append(
            f"validation.steps {scored} is more than {run}: held-out records are scored only "
            "before the first step and at the end"
        )
    return found
