"""Losses by name, and what each of them needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

# What a loss is a function of: two answers to one prompt, all answers to one prompt with their
# scores, or single answers that are good or bad.
Compared = Literal["pairs", "rows", "answers"]
# The field of `AnswerLogps` that, times beta, is an answer's implicit reward in the metrics.
Reward = Literal["ratio", "policy", "mean"]
# Options of losses that use the score of an f-divergence.
DIVERGENCE_OPTIONS = ("f_divergence_type", "f_alpha_divergence_coef")
# An option that is a property of the log-probs, so that any loss of pairs can have it.
LENGTH_OPTION = "ld_alpha"


@dataclass(frozen=True)
class About:
    """What a user should know of a loss; the page of losses is made of it."""

    formula: str
    use: str  # when to take it
    equal: str  # what it was compared with
    usual_beta: tuple[float, float] | None = None  # the range of `beta`, where 0.1 is outside
    # settings that have no default for it, each with the usual value
    required: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PreferenceLoss:
    """A registered loss."""

    name: str  # what settings call it
    compute: Callable[..., Tensor]  # returns a loss of each comparison, not divided [P]
    compared: Compared
    reference: bool  # whether log-probs of a reference are computed before the first step
    # For losses that couple examples: it sees the answers of a whole step of all processes, without
    # gradients. What it returns goes to `compute` behind the answers: a scalar, or a row for each
    # comparison of the step, of which `compute` gets the micro-batch's.
    statistic: Callable[..., Tensor] | None
    options: tuple[str, ...]  # the settings that it uses
    reward: Reward | None
    about: About | None

    @property
    def required(self) -> Mapping[str, str]:
        """Settings that must be given, each with the usual value."""
        return {} if self.about is None else self.about.required

    @property
    def source(self) -> str:
        """Where it comes from: the first sentence of its docstring."""
        return " ".join((self.compute.__doc__ or "").split("\n\n")[0].split())


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {}


def preference_loss(
    name: str,
    *,
    reference: bool,
    compared: Compared = "pairs",
    divergences: bool = False,
    statistic: Callable[..., Tensor] | None = None,
    reward: Reward | None = "ratio",
    about: About | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a pure function of log-probs as a loss.

    The function is called with `AnswerLogps`: of pairs, the chosen and the rejected ones; of rows,
    those of one row and its scores [k]; of answers, those and whether each is good [P]. Its
    keyword arguments are the settings that it uses. `divergences` says that it uses
    `AnswerLogps.score`. See `PreferenceLoss` for the other arguments.
    """

    def register(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        parameters = inspect.signature(compute).parameters.values()
        options = tuple(one.name for one in parameters if one.kind is one.KEYWORD_ONLY)
        if divergences:
            options += DIVERGENCE_OPTIONS
        if compared == "pairs":
            options += (LENGTH_OPTION,)
        PREFERENCE_LOSSES[name] = PreferenceLoss(
            name, compute, compared, reference, statistic, options, reward, about
        )
        return compute

    return register


def options_of(loss: PreferenceLoss, settings: Any) -> dict[str, Any]:
    """The keyword arguments of a loss, by the settings of the same names."""
    return {
        name: getattr(settings, name)
        for name in loss.options
        if name not in (*DIVERGENCE_OPTIONS, LENGTH_OPTION)
    }
