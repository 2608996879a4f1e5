"""Preference losses by name, and what each of them needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class AnswerLogps:
    """One answer of each pair of a micro-batch.

    Attributes:
        policy: log pi(y|x), summed over the answer's tokens [P].
        reference: the same under the reference model [P]; None for a loss that needs none.
        tokens: trained tokens of each answer [P].
    """

    policy: Tensor
    reference: Tensor | None
    tokens: Tensor

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
    """A registered loss.

    Attributes:
        name: by which settings name it.
        compute: called with the chosen answers, the rejected ones and the stage's settings. Of a
            loss without pairs: the answers, whether each is desirable [P], and the settings.
        reference: whether log-probs of a reference are computed before the first step.
        paired: whether it compares two answers to one prompt.
        statistic: for losses that couple examples: sees the answers of a whole step of all
            processes, without gradients, and its result goes to `compute` as a last argument.
    """

    name: str
    compute: Callable[..., LossValue]
    reference: bool
    paired: bool
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
