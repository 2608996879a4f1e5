"""Losses of pairs that need no reference, so that no pass over the data comes before training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.losses.answers import AnswerLogps, log_one_minus_exp, log_sigmoid, smoothed
from tandem.losses.registry import About, preference_loss

if TYPE_CHECKING:
    from torch import Tensor


@preference_loss(
    "sft",
    reference=False,
    reward=None,
    about=About(
        formula="-log π(y_w) / mean tokens of the step's chosen answers",
        use="In a mixture, keeps chosen answers likely.",
        equal="TRL",
    ),
)
def sft(chosen: AnswerLogps, _: AnswerLogps) -> Tensor:
    """The chosen answers' negative log-likelihood per token of the step, as in supervised tuning.

    Added to another loss, it keeps the chosen answers likely: `{sigmoid: 1, sft: 0.1}`.
    """
    return -chosen.policy / chosen.step_tokens


@preference_loss(
    "sft_norm",
    reference=False,
    reward=None,
    about=About(
        formula="-log π(y_w) / n_w",
        use="RPO is `{sigmoid: 1, sft_norm: α}`.",
        equal="values by hand",
    ),
)
def sft_norm(chosen: AnswerLogps, _: AnswerLogps) -> Tensor:
    """The same per token of each answer: the second term of RPO (arXiv 2404.19733)."""
    return -chosen.mean


@preference_loss(
    "simpo",
    reference=False,
    reward="mean",
    about=About(
        usual_beta=(2.0, 10.0),
        formula="-log σ(β (log π(y_w) / n_w - log π(y_l) / n_l) - γ)",
        use="One stage without a reference pass; set `beta` to 2 or more.",
        equal="TRL",
    ),
)
def simpo(
    chosen: AnswerLogps,
    rejected: AnswerLogps,
    *,
    beta: float,
    simpo_gamma: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """SimPO, equation 6 of arXiv 2405.14734: log-probs per token, and a target margin."""
    margin = beta * (chosen.mean - rejected.mean) - simpo_gamma
    return smoothed(margin, label_smoothing)


@preference_loss(
    "cpo",
    reference=False,
    reward="policy",
    about=About(
        formula="-log σ(β (log π(y_w) - log π(y_l))) + α `sft`",
        use="Without a reference, kept near the data by `cpo_alpha`.",
        equal="TRL",
    ),
)
def cpo(
    chosen: AnswerLogps,
    rejected: AnswerLogps,
    *,
    beta: float,
    cpo_alpha: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """CPO (arXiv 2401.08417): equation 3, and the chosen answers' negative log-likelihood."""
    prefer = smoothed(beta * (chosen.policy - rejected.policy), label_smoothing)
    return prefer - cpo_alpha * chosen.policy / chosen.step_tokens


@preference_loss(
    "orpo",
    reference=False,
    reward="mean",
    about=About(
        formula="`sft` - β log σ(log odds(y_w) - log odds(y_l))",
        use="Instead of SFT and DPO, from a base model.",
        equal="TRL, whose likelihood also counts the prompt",
    ),
)
def orpo(chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float) -> Tensor:
    """ORPO, equations 6 and 7 of arXiv 2403.07691; `beta` is its lambda.

    The likelihood is of the answers alone, and so are the odds.
    """
    odds = (chosen.mean - log_one_minus_exp(chosen.mean)) - (
        rejected.mean - log_one_minus_exp(rejected.mean)
    )
    return -chosen.policy / chosen.step_tokens - beta * log_sigmoid(odds)
