"""Learning-rate schedules by name: the rate is a function of a step's number, without any state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tandem.recipe.training_settings import TrainingSettings


@dataclass(frozen=True)
class Progress:
    """Where a step stands, in steps."""

    done: int  # since the warm-up
    steps: int  # of the run after the warm-up
    total: int  # of the run

    @property
    def left(self) -> float:
        """The share of the steps after the warm-up that remains, from 1."""
        return max(0.0, (self.steps - self.done) / max(1, self.steps))


def _cosine(at: Progress, _: TrainingSettings) -> float:
    """Half a wave (arXiv 1608.03983, equation 5, without restarts)."""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (at.done / max(1, at.steps)))))


def _wsd(at: Progress, settings: TrainingSettings) -> float:
    """The peak, and a fall at the end as 1 - sqrt (arXiv 2405.18392, equation 1 and section 3).

    Of the falls that the paper compares, this one ends lowest.
    """
    falling = min(at.steps, math.ceil(at.total * settings.decay_ratio))
    done = at.done - (at.steps - falling)
    return 1.0 if done <= 0 else 1.0 - math.sqrt(done / falling)


# Each returns a share from 1 to 0 of the way between the peak rate and the floor.
LR_SCHEDULES: dict[str, Callable[[Progress, TrainingSettings], float]] = {
    "linear": lambda at, _: at.left,
    "cosine": _cosine,
    "constant": lambda _at, _: 1.0,
    "constant_with_warmup": lambda _at, _: 1.0,
    "wsd": _wsd,
    "polynomial": lambda at, settings: at.left**settings.lr_power,
}


def make_schedule(settings: TrainingSettings, total_steps: int) -> Callable[[int], float]:
    """A stage's learning rate as a function of a step's number, from 0.

    Warm-up is linear from 0, over a count of steps or a share of all (rounded up). After it the
    rate falls to `min_lr_ratio` of the peak, which it would reach one step after the last.
    """
    shape, floor = LR_SCHEDULES[settings.lr_scheduler], settings.min_lr_ratio
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = math.ceil(total_steps * (settings.warmup_ratio or 0.0))

    def rate(step: int) -> float:
        if step < warmup:
            return settings.learning_rate * (step / warmup)
        share = shape(Progress(step - warmup, total_steps - warmup, total_steps), settings)
        return settings.learning_rate * (share * (1.0 - floor) + floor)

    return rate
