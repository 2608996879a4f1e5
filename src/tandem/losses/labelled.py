"""Losses of single answers that are labelled as good or bad, against a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.losses.answers import AnswerLogps
from tandem.losses.registry import About, preference_loss

if TYPE_CHECKING:
    from torch import Tensor


def _divergence_estimate(mismatched: AnswerLogps) -> Tensor:
    """The KL estimate of a step: the mean log-ratio of answers to other prompts, at least 0."""
    return mismatched.ratio.mean().clamp(min=0.0)


@preference_loss(
    "kto",
    reference=True,
    compared="answers",
    statistic=_divergence_estimate,
    about=About(
        formula="w (1 - σ(β (r - z))) if good, w (1 - σ(β (z - r))) if bad; z estimates the KL",
        use="Thumbs up and down, without pairs.",
        equal="TRL",
    ),
)
def kto(
    answers: AnswerLogps,
    good: Tensor,
    divergence: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """KTO, equation 7 of arXiv 2402.01306; `divergence` is z_0, estimated over the step."""
    gain = beta * (answers.ratio - divergence)
    of_good = desirable_weight * (1 - gain.sigmoid())
    of_bad = undesirable_weight * (1 - (-gain).sigmoid())
    return of_good.where(good, of_bad)


@preference_loss(
    "apo_zero_unpaired",
    reference=True,
    compared="answers",
    about=About(
        formula="w (1 - σ(β r)) if good, w σ(β r) if bad",
        use="The same without the divergence.",
        equal="TRL",
    ),
)
def apo_zero_unpaired(
    answers: AnswerLogps,
    good: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """APO-zero (arXiv 2408.06266, equation 7) of answers that have no partner."""
    gain = beta * answers.ratio
    return (desirable_weight * (1 - gain.sigmoid())).where(
        good, undesirable_weight * gain.sigmoid()
    )
