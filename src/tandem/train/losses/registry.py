"""Preference losses by name, and what each of them needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class AnswerLogps:
    """One answer of each pair of a micro-batch."""

    policy: Tensor  # log pi(y|x), summed over the answer's tokens [P]
    reference: Tensor | None  # the same under the reference [P]; None for a loss that needs none
    tokens: Tensor  # trained tokens of each answer [P]

    @property
    def ratio(self) -> Tensor:
        """log pi(y|x) - log pi_ref(y|x), of a loss that has a reference [P]."""
        assert self.reference is not None
        return self.policy - self.reference


@dataclass(frozen=True)
class LossValue:
    """A loss of each pair, not yet divided by their number, and what to report of each [P]."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class PreferenceLoss:
    """A registered loss."""

    name: str  # what settings call it
    # called with the chosen answers, the rejected ones and the stage's settings; of a loss without
    # pairs: with the answers, whether each is desirable [P], and the settings
    compute: Callable[..., LossValue]
    reference: bool  # whether log-probs of a reference are computed before the first step
    paired: bool  # whether it compares two answers to one prompt
    # for losses that couple examples: sees the answers of a whole step of all processes, without
    # gradients, and its result goes to `compute` as a last argument
    statistic: Callable[..., Any] | None


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {}


def preference_loss(
    name: str,
    *,
    reference: bool,
    paired: bool = True,
    statistic: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., LossValue]], Callable[..., LossValue]]:
    """Register a pure function of log-probs as a loss; see `PreferenceLoss` for the arguments."""

    def register(compute: Callable[..., LossValue]) -> Callable[..., LossValue]:
        PREFERENCE_LOSSES[name] = PreferenceLoss(name, compute, reference, paired, statistic)
        return compute

    return register
