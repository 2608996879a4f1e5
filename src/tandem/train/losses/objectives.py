"""What a step minimises: from log-probs of sequences to a loss and named sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.data.encoded.example import Example
from tandem.errors import UserError
from tandem.recipe.training_settings import DpoSettings
from tandem.train.losses import paired
from tandem.train.losses.registry import PREFERENCE_LOSSES, AnswerLogps, PreferenceLoss

# A loss is registered when its module is imported.
LOSS_MODULES = (paired,)


def negative_log_likelihood(logps: Tensor) -> Tensor:
    """Sum the negative log-probs of sequences [S], to be divided by the step's trained tokens."""
    return -logps.sum()


@dataclass(frozen=True)
class LossSums:
    """A micro-batch's share of a step: the loss to differentiate, not yet divided, and sums.

    The sums, the loss among them, are scalars of one dtype on the device: reading one would wait.
    """

    loss: Tensor
    sums: dict[str, Tensor]


class Objective(Protocol):
    """Turns sequence log-probs into losses; the loop knows nothing else about a stage."""

    # whether an example's loss depends on the others of its step: `see_step` is then called before
    # the step's first `loss`
    couples: bool

    def denominator(self, examples: Sequence[Example]) -> int:
        """What the step's summed loss is divided by, known before its first forward."""
        ...

    def see_step(self, logps: Tensor, indices: Sequence[int]) -> None:
        """Take the log-probs of a whole step, of all processes, without gradients [S]."""
        ...

    def loss(
        self, logps: Tensor, weights: Tensor, indices: Sequence[int], *, first_step: bool
    ) -> LossSums:
        """The loss of a micro-batch.

        Args:
            logps: of its sequences [S].
            weights: 1, or 0 for a sequence that is only padding [S].
            indices: of its examples.
            first_step: whether nothing is trained yet.
        """
        ...

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Named averages from sums over one or more steps, `count` (denominators) among them."""
        ...


def sequence_tokens(tree: Example) -> list[int]:
    """Targets of each of a tree's sequences, those of the prefix counted for each."""
    shared = int(tree.prefix.trained.sum())
    return [shared + int(branch.trained.sum()) for branch in tree.branches]


def trained_tokens(tree: Example) -> int:
    """Targets of a tree over all its sequences."""
    return sum(sequence_tokens(tree))


class SupervisedObjective:
    """Negative log-likelihood per trained token of the step."""

    couples = False

    def denominator(self, examples: Sequence[Example]) -> int:
        """The step's trained tokens."""
        return sum(trained_tokens(example) for example in examples)

    def see_step(self, logps: Tensor, indices: Sequence[int]) -> None:
        """Not called: every token counts for itself."""

    def loss(
        self, logps: Tensor, weights: Tensor, indices: Sequence[int], *, first_step: bool
    ) -> LossSums:
        """Sum of negative log-probs; see `Objective.loss`."""
        del indices, first_step
        loss = negative_log_likelihood(logps * weights)
        return LossSums(loss, {"loss": loss.detach()})

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Loss per trained token."""
        return {"loss": sums["loss"] / sums["count"]}


def find_loss(name: str) -> PreferenceLoss:
    """The loss of a name. Raises UserError, with the names there are, for another one."""
    if name not in PREFERENCE_LOSSES:
        raise UserError(f"there is no loss {name!r}; it may be {', '.join(PREFERENCE_LOSSES)}")
    return PREFERENCE_LOSSES[name]


class PreferenceObjective:
    """A preference loss averaged over the step's pairs.

    Args:
        loss, settings: a registered loss, and the stage's settings with its numbers.
        tokens: trained tokens of every example's two answers [n, 2].
        reference: their log-probs under the reference [n, 2] float64, None for a loss without.
        relative_tolerance: of the step-0 check, what the precision in use explains.
    """

    def __init__(
        self,
        loss: PreferenceLoss,
        settings: DpoSettings,
        tokens: NDArray[Any],
        reference: NDArray[np.float64] | None,
        relative_tolerance: float,
    ) -> None:
        self.couples = loss.statistic is not None
        self._loss, self._settings = loss, settings
        self._tokens = torch.from_numpy(np.asarray(tokens))
        self._reference = None if reference is None else torch.from_numpy(reference)
        self._tolerance = relative_tolerance
        self._statistic: tuple[Any, ...] = ()

    def denominator(self, examples: Sequence[Example]) -> int:
        """The step's pairs."""
        return len(examples)

    def see_step(self, logps: Tensor, indices: Sequence[int]) -> None:
        """Compute the loss's statistic of a step."""
        if self._loss.statistic is not None:
            answers = self._answers(logps.view(-1, 2), indices)
            self._statistic = (self._loss.statistic(*answers, self._settings),)

    def loss(
        self, logps: Tensor, weights: Tensor, indices: Sequence[int], *, first_step: bool
    ) -> LossSums:
        """Sum of the pairs' losses; in the first step, the step-0 check as well."""
        policy = logps.view(-1, 2)  # [P, 2] chosen, rejected
        chosen, rejected = self._answers(policy, indices)
        if first_step and chosen.reference is not None and rejected.reference is not None:
            reference = torch.stack((chosen.reference, rejected.reference), dim=1)
            self._check_start(policy.detach(), reference)
        value = self._loss.compute(chosen, rejected, self._settings, *self._statistic)
        # A pair that is only padding has log-probs of 0, and yet a loss.
        real = weights.view(-1, 2)[:, 0]
        loss = (value.loss * real).sum()
        metrics = {
            **value.metrics,
            "logps/chosen": policy[:, 0].detach(),
            "logps/rejected": policy[:, 1].detach(),
        }
        sums = {name: (metric * real).sum() for name, metric in metrics.items()}
        return LossSums(loss, {"loss": loss.detach(), **sums})

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over pairs; those of rewards have TRL's names."""
        return {name: value / sums["count"] for name, value in sums.items() if name != "count"}

    def _answers(self, policy: Tensor, indices: Sequence[int]) -> tuple[AnswerLogps, AnswerLogps]:
        """The chosen and the rejected answers of a micro-batch, padded like the policy's."""

        def columns(values: Tensor) -> tuple[Tensor, ...]:
            filled = torch.zeros(policy.shape, dtype=policy.dtype)
            filled[: len(indices)] = values[list(indices)].to(policy.dtype)
            return filled.to(policy.device).unbind(dim=1)

        tokens = columns(self._tokens)
        reference = (None, None) if self._reference is None else columns(self._reference)
        chosen, rejected = map(AnswerLogps, policy.unbind(dim=1), reference, tokens)
        return chosen, rejected

    def _check_start(self, policy: Tensor, reference: Tensor) -> None:
        # With B = 0 the policy is the reference: any other difference is a mistake that training
        # would silently build on.
        gap = (policy - reference).abs()
        allowed = self._tolerance * (reference.abs() + 10.0)
        if bool((gap > allowed).any()):
            worst = int((gap - allowed).flatten().argmax())
            raise UserError(
                "step-0 check: before training, the policy must equal the reference, but a "
                f"log-probability is {float(policy.flatten()[worst]):.4f} under the policy and "
                f"{float(reference.flatten()[worst]):.4f} under the reference. Likely causes: an "
                "adapter that does not start at zero, trained parameters outside the adapter, "
                "dropout that is on, or a reference computed in another precision."
            )
