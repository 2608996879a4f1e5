"""One or more losses, each with its weight and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from tandem.errors import UserError
from tandem.losses.answers import Divergence, divergence_of
from tandem.losses.custom import check_custom, is_custom
from tandem.losses.known import find_loss
from tandem.losses.registry import (
    LENGTH_OPTION,
    PREFERENCE_LOSSES,
    Compared,
    PreferenceLoss,
    Reward,
    options_of,
)
from tandem.recipe.dpo_settings import DpoSettings


@dataclass(frozen=True)
class Part:
    """A loss of a mixture."""

    loss: PreferenceLoss
    weight: float
    options: dict[str, Any]

    def compute(self, *args: Any) -> Tensor:
        """The loss of each comparison [P]."""
        return self.loss.compute(*args, **self.options)


@dataclass(frozen=True)
class Mixture:
    """What the settings of a stage ask for."""

    parts: tuple[Part, ...]
    compared: Compared
    couples: bool  # whether any of them needs a statistic of the whole step
    beta: float
    divergence: Divergence | None

    @classmethod
    def of(cls, settings: DpoSettings) -> Mixture:
        """The losses of some settings, which have been checked."""
        parts = tuple(
            Part(loss, weight, options_of(loss, settings))
            for loss, weight in ((find_loss(name), w) for name, w in settings.losses.items())
        )
        divergence = divergence_of(settings.f_divergence_type, settings.f_alpha_divergence_coef)
        return cls(parts, settings.compared, settings.sees_steps, settings.beta, divergence)

    @property
    def reward(self) -> Reward | None:
        """What of an answer is its implicit reward: that of the first loss that has one."""
        return next((part.loss.reward for part in self.parts if part.loss.reward), None)

    def statistics(self, *answers: Any) -> tuple[Tensor | None, ...]:
        """The statistic of each loss of a step's answers; None for a loss without one."""
        return tuple(
            None if part.loss.statistic is None else part.loss.statistic(*answers)
            for part in self.parts
        )

    def losses(
        self, *args: Any, statistics: tuple[Tensor | None, ...] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses [P], and each of several losses by itself.

        `args` are the answers as the losses take them; `statistics` those of these answers.
        """
        values = []
        for number, part in enumerate(self.parts):
            compute = partial(part.compute, *args)
            known = statistics[number] if statistics else None
            values.append(compute() if known is None else compute(known))
        weighted = [part.weight * value for part, value in zip(self.parts, values, strict=True)]
        total = weighted[0] if len(weighted) == 1 else sum(weighted[1:], start=weighted[0])
        if len(values) == 1:
            return total, {}
        named = zip(self.parts, values, strict=True)
        return total, {f"loss/{part.loss.name}": value.detach() for part, value in named}


def check_losses(settings: DpoSettings) -> None:
    """Look at the losses of the user's own before anything is computed with them.

    Raises UserError for one that is not there or cannot be called, and for a setting of losses
    that none of the losses uses.
    """
    if not any(map(is_custom, settings.losses)):
        return
    parts = Mixture.of(settings).parts
    used = {LENGTH_OPTION, *(option for part in parts for option in part.loss.options)}
    if settings.f_divergence_type != "reverse_kl":
        raise UserError(
            f"f_divergence_type has no effect with loss {' and '.join(settings.losses)}; remove it"
        )
    every = {option for loss in PREFERENCE_LOSSES.values() for option in loss.options}
    for option in sorted(every - used):
        if getattr(settings, option) != type(settings).model_fields[option].default:
            raise UserError(
                f"{option} has no effect with loss {' and '.join(settings.losses)}; remove it, or "
                "let the function take it as a keyword argument"
            )
    for part in parts:
        if is_custom(part.loss.name):
            check_custom(part.loss, part.options)
