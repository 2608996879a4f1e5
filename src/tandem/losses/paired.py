"""Losses that compare a chosen and a rejected answer to one prompt, against a reference.

Below, r is the log-ratio of policy and reference, w the chosen answer, l the rejected one, and
delta = r_w - r_l (of the f-divergence's scores, where there is one).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tandem.losses.answers import AnswerLogps, log_sigmoid, smoothed
from tandem.losses.registry import About, preference_loss

if TYPE_CHECKING:
    from torch import Tensor


def _delta(chosen: AnswerLogps, rejected: AnswerLogps) -> Tensor:
    return chosen.score - rejected.score


def _delta_per_token(chosen: AnswerLogps, rejected: AnswerLogps) -> Tensor:
    return chosen.score / chosen.tokens - rejected.score / rejected.tokens


@preference_loss(
    "sigmoid",
    reference=True,
    divergences=True,
    about=About(
        formula="-log σ(β Δ); smoothed by ε: -(1 - ε) log σ(β Δ) - ε log σ(-β Δ)",
        use="The default. `label_smoothing` where some labels are wrong.",
        equal="TRL (loss, log-probs, gradients)",
    ),
)
def sigmoid(
    chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """DPO, equation 7 of arXiv 2305.18290; with label smoothing cDPO.

    cDPO: E. Mitchell, "A note on DPO with noisy preferences and relationship to IPO", 2023.
    """
    return smoothed(beta * _delta(chosen, rejected), label_smoothing)


@preference_loss(
    "sigmoid_norm",
    reference=True,
    divergences=True,
    about=About(
        formula="-log σ(β (r_w / n_w - r_l / n_l))",
        use="Where answers grow longer under `sigmoid`.",
        equal="TRL",
        usual_beta=(2.0, 10.0),
    ),
)
def sigmoid_norm(
    chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """Length-normalised DPO, as in Tulu 3 (arXiv 2411.15124): log-ratios per token."""
    return smoothed(beta * _delta_per_token(chosen, rejected), label_smoothing)


@preference_loss(
    "robust",
    reference=True,
    divergences=True,
    about=About(
        formula="(-(1 - ε) log σ(β Δ) + ε log σ(-β Δ)) / (1 - 2ε)",
        use="Where a known share of labels is wrong.",
        equal="TRL",
        required={"label_smoothing": "0.1"},
    ),
)
def robust(
    chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float, label_smoothing: float
) -> Tensor:
    """Robust DPO (arXiv 2403.00409): unbiased where a share of the labels is flipped."""
    x = beta * _delta(chosen, rejected)
    clean, flipped = -log_sigmoid(x), -log_sigmoid(-x)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@preference_loss(
    "hinge",
    reference=True,
    divergences=True,
    about=About(
        formula="max(0, 1 - β Δ)",
        use="Stops at a margin; for pairs that are easy to fit.",
        equal="TRL",
    ),
)
def hinge(chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float) -> Tensor:
    """The hinge loss of SLiC (arXiv 2305.10425), on log-ratios as in RSO (arXiv 2309.06657)."""
    return (1 - beta * _delta(chosen, rejected)).relu()


@preference_loss(
    "ipo",
    reference=True,
    divergences=True,
    about=About(
        formula="(r_w / n_w - r_l / n_l - 1 / (2β))²",
        use="Where `sigmoid` overfits: the margin has a target.",
        equal="TRL",
    ),
)
def ipo(chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float) -> Tensor:
    """IPO, equation 17 of arXiv 2310.12036, with log-probs per token as its authors train it."""
    return (_delta_per_token(chosen, rejected) - 1 / (2 * beta)) ** 2


@preference_loss(
    "dpo_positive",
    reference=True,
    about=About(
        formula="-log σ(β (Δ - λ max(0, -r_w)))",
        use="Where chosen answers become less likely, as with pairs that differ little.",
        equal="values by hand",
    ),
)
def dpo_positive(
    chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float, dpop_lambda: float
) -> Tensor:
    """DPO-positive (arXiv 2402.13228): a chosen answer that becomes less likely costs more."""
    fall = (-chosen.ratio).relu()
    return -log_sigmoid(beta * (chosen.ratio - rejected.ratio - dpop_lambda * fall))


@preference_loss(
    "apo_zero",
    reference=True,
    about=About(
        formula="1 - σ(β r_w) + σ(β r_l)",
        use="Where chosen answers are better than the model's own.",
        equal="TRL",
    ),
)
def apo_zero(chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float) -> Tensor:
    """APO-zero, equation 7 of arXiv 2408.06266: the chosen answer rises, the rejected one falls."""
    return 1 - (beta * chosen.ratio).sigmoid() + (beta * rejected.ratio).sigmoid()


@preference_loss(
    "apo_down",
    reference=True,
    about=About(
        formula="σ(β r_w) + 1 - σ(β Δ)",
        use="Where the model is better than the chosen answers.",
        equal="TRL",
    ),
)
def apo_down(chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float) -> Tensor:
    """APO-down, equation 8 of arXiv 2408.06266: both fall, the rejected answer more."""
    apart = beta * (chosen.ratio - rejected.ratio)
    return (beta * chosen.ratio).sigmoid() + 1 - apart.sigmoid()


@preference_loss(
    "exo_pair",
    reference=True,
    divergences=True,
    about=About(
        formula="KL of (σ(β Δ), σ(-β Δ)) from (1 - ε, ε)",
        use="A reverse-KL match of the labels; needs `label_smoothing`.",
        equal="TRL",
        required={"label_smoothing": "1e-3"},
    ),
)
def exo_pair(
    chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float, label_smoothing: float
) -> Tensor:
    """EXO for pairs, equation 16 of arXiv 2402.00856: KL(policy || labels)."""
    x = beta * _delta(chosen, rejected)
    of_chosen = x.sigmoid() * (log_sigmoid(x) - math.log1p(-label_smoothing))
    of_rejected = (-x).sigmoid() * (log_sigmoid(-x) - math.log(label_smoothing))
    return of_chosen + of_rejected


@preference_loss(
    "nca_pair",
    reference=True,
    about=About(
        formula="-log σ(β r_w) - (log σ(-β r_w) + log σ(-β r_l)) / 2",
        use="Where the likelihood of chosen answers must not fall.",
        equal="TRL",
    ),
)
def nca_pair(chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float) -> Tensor:
    """NCA for pairs (arXiv 2402.05369): both rewards are kept near 0, the chosen one above."""
    of_chosen, of_rejected = beta * chosen.ratio, beta * rejected.ratio
    away = 0.5 * log_sigmoid(-of_chosen) + 0.5 * log_sigmoid(-of_rejected)
    return -log_sigmoid(of_chosen) - away


@preference_loss(
    "bco_pair",
    reference=True,
    about=About(
        formula="-log σ(β r_w) - log σ(-β r_l)",
        use="Judges each answer by itself.",
        equal="TRL",
    ),
)
def bco_pair(chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float) -> Tensor:
    """BCO on pairs (arXiv 2404.04656), without its reward shift, as TRL has it for pairs."""
    return -log_sigmoid(beta * chosen.ratio) - log_sigmoid(-beta * rejected.ratio)


@preference_loss(
    "sppo_hard",
    reference=True,
    about=About(
        formula="(r_w - 1/(2β))² + (r_l + 1/(2β))²",
        use="For rounds of self-play; both answers have a target.",
        equal="TRL",
        usual_beta=(1e-3, 0.1),
    ),
)
def sppo_hard(chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float) -> Tensor:
    """SPPO, equation 4.7 of arXiv 2405.00675, where the chosen answer wins with probability 1."""
    return (chosen.ratio - 0.5 / beta) ** 2 + (rejected.ratio + 0.5 / beta) ** 2


@preference_loss(
    "discopop",
    reference=True,
    divergences=True,
    about=About(
        formula="(1 - m) (-log σ(x)) + m exp(-x), x = β Δ, m = σ(x / τ)",
        use="A loss found by search; between logistic and exponential.",
        equal="TRL",
    ),
)
def discopop(
    chosen: AnswerLogps, rejected: AnswerLogps, *, beta: float, discopop_tau: float
) -> Tensor:
    """DiscoPOP, equation 5 of arXiv 2406.08414: a blend of the logistic and exponential losses."""
    x = beta * _delta(chosen, rejected)
    blend = (x / discopop_tau).sigmoid()
    return -(1 - blend) * log_sigmoid(x) + blend * (-x).exp()


def _matched_margins(chosen: AnswerLogps, rejected: AnswerLogps) -> Tensor:
    """The reference's margin that has the rank of each pair's own margin in the step [step]."""
    import torch

    assert chosen.reference is not None
    assert rejected.reference is not None
    own = (chosen.policy - rejected.policy).argsort(stable=True)
    sorted_reference = (chosen.reference - rejected.reference).sort().values
    return torch.empty_like(sorted_reference).index_copy(0, own, sorted_reference)


@preference_loss(
    "aot",
    reference=True,
    statistic=_matched_margins,
    about=About(
        formula="`sigmoid` of margins sorted against the reference's margins, over the step",
        use="Aligns the distribution of margins instead of each pair.",
        equal="TRL",
    ),
)
def aot(
    chosen: AnswerLogps,
    rejected: AnswerLogps,
    matched: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT for pairs, algorithm 1 of arXiv 2406.05882: margins compared by their rank in the step.

    `matched` has the reference's margin of the same rank as each pair's [P].
    """
    return smoothed(beta * (chosen.policy - rejected.policy - matched), label_smoothing)


def _matched_ratios(chosen: AnswerLogps, rejected: AnswerLogps) -> Tensor:
    """For each pair of a step the values of the same rank on the other side [step, 2].

    They are: rejected by the rank of its chosen answer; chosen by the rank of its rejected one.
    """
    import torch

    own, other = chosen.ratio.argsort(stable=True), rejected.ratio.argsort(stable=True)
    rejected_of = torch.empty_like(chosen.ratio).index_copy(0, own, rejected.ratio[other])
    chosen_of = torch.empty_like(chosen.ratio).index_copy(0, other, chosen.ratio[own])
    return torch.stack((rejected_of, chosen_of), dim=1)


@preference_loss(
    "aot_unpaired",
    reference=True,
    statistic=_matched_ratios,
    about=About(
        formula="`sigmoid` of chosen ratios sorted against rejected ones, over the step",
        use="The same for answers whose pairing means little.",
        equal="TRL",
    ),
)
def aot_unpaired(
    chosen: AnswerLogps,
    rejected: AnswerLogps,
    matched: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """AOT without pairs, algorithm 1 of arXiv 2406.05882: ratios compared by rank in the step.

    The answers that are compared can be in different micro-batches. So each one meets the other's
    value, `matched` [P, 2], as a constant, and both together have the loss and its gradients.
    """
    rejected_of, chosen_of = matched.unbind(dim=1)
    loss = smoothed(beta * (chosen.ratio - rejected_of), label_smoothing)
    other = smoothed(beta * (chosen_of - rejected.ratio), label_smoothing)
    return loss + other - other.detach()
