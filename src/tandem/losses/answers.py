"""What a loss is given of an answer, and the functions that several losses share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

DivergenceName = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
Divergence = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class AnswerLogps:
    """One answer of each of P comparisons, or P answers."""

    policy: Tensor  # log pi(y|x), summed over the answer's tokens [P]
    reference: Tensor | None  # the same under the reference [P]; None for a loss that needs none
    tokens: Tensor  # trained tokens of each answer [P]
    # mean of `tokens` over the whole step, so that a sum over it is a mean per token of the step
    step_tokens: Tensor | float = 1.0
    divergence: Divergence | None = None  # f' of an f-divergence, as a function of `ratio`

    @property
    def ratio(self) -> Tensor:
        """log pi(y|x) - log pi_ref(y|x), of a loss that has a reference [P]."""
        assert self.reference is not None
        return self.policy - self.reference

    @property
    def score(self) -> Tensor:
        """What the divergence makes of `ratio`: `ratio` itself under the reverse KL [P]."""
        return self.ratio if self.divergence is None else self.divergence(self.ratio)

    @property
    def mean(self) -> Tensor:
        """log pi(y|x) per token [P]."""
        return self.policy / self.tokens


def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), finite for every x."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by the accurate one of two forms (Maechler, 2012)."""
    import torch

    near = (-torch.expm1(torch.where(x > -math.log(2), x, -1.0))).log()
    far = torch.log1p(-torch.where(x > -math.log(2), -1.0, x).exp())
    return torch.where(x > -math.log(2), near, far)


def smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(x), where labels are wrong with a probability of `label_smoothing`."""
    if label_smoothing == 0.0:
        return -log_sigmoid(x)
    return -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def divergence_of(name: DivergenceName, alpha: float) -> Divergence | None:
    """f' of an f-divergence, as a function of the log-ratio; None for the reverse KL.

    Table 1 of arXiv 2309.16240; constants cancel between two answers and are left out as in TRL.
    `alpha` is that of the alpha-divergence, which is the reverse KL at 1.
    """
    if name == "reverse_kl" or (name == "alpha_divergence" and alpha == 1.0):
        return None
    if name == "forward_kl":
        return lambda ratio: 1 - (-ratio).exp()
    if name == "js_divergence":
        return lambda ratio: math.log(2) + log_sigmoid(ratio)
    return lambda ratio: ((alpha - 1) * ratio).expm1() / (alpha - 1)
