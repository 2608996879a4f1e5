"""Losses of all answers to one prompt at once, with their scores, against a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.losses.answers import AnswerLogps, log_sigmoid
from tandem.losses.registry import About, preference_loss

if TYPE_CHECKING:
    from torch import Tensor


@preference_loss(
    "plackett_luce",
    reference=True,
    compared="rows",
    about=About(
        formula="-Σ_i log (exp β r_i / Σ_{j: s_j < s_i or j = i} exp β r_j)",
        use="Rankings; with two answers it is `sigmoid`.",
        equal="values by hand",
    ),
)
def plackett_luce(answers: AnswerLogps, scores: Tensor, *, beta: float) -> Tensor:
    """DPO on rankings, equation 20 of arXiv 2305.18290, of a row of k answers [k].

    Each answer competes with those of lower scores. Answers of equal scores do not compete with
    each other.
    """
    rewards = beta * answers.ratio
    lower = scores[:, None] > scores[None, :]  # [k, k]
    lower.fill_diagonal_(True)
    rivals = rewards[None, :].masked_fill(~lower, -float("inf"))
    return (rivals.logsumexp(dim=1) - rewards).sum()


@preference_loss(
    "info_nca",
    reference=True,
    compared="rows",
    about=About(
        formula="-Σ_i softmax(s / τ)_i log softmax(β r)_i",
        use="Where the scores themselves mean something.",
        equal="values by hand",
    ),
)
def info_nca(
    answers: AnswerLogps, scores: Tensor, *, beta: float, score_temperature: float
) -> Tensor:
    """InfoNCA (arXiv 2402.05369): cross-entropy of two softmaxes over a row of k answers [k]."""
    target = (scores / score_temperature).softmax(dim=0)
    return -(target * (beta * answers.ratio).log_softmax(dim=0)).sum()


@preference_loss(
    "nca",
    reference=True,
    compared="rows",
    about=About(
        formula="-Σ_i (softmax(s / τ)_i log σ(β r_i) + log σ(-β r_i) / k)",
        use="The same, where likelihoods must not fall.",
        equal="values by hand",
    ),
)
def nca(answers: AnswerLogps, scores: Tensor, *, beta: float, score_temperature: float) -> Tensor:
    """NCA (arXiv 2402.05369) of a row of k answers [k]: each against its own reference."""
    target = (scores / score_temperature).softmax(dim=0)
    rewards = beta * answers.ratio
    return -(target * log_sigmoid(rewards)).sum() - log_sigmoid(-rewards).mean()
