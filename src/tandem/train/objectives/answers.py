"""What is known of the answers before training, and a micro-batch's share of it on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.errors import UserError
from tandem.losses.answers import AnswerLogps, Divergence


@dataclass(frozen=True)
class Answers:
    """The answers of n examples, one after the other: S sequences."""

    first: NDArray[np.int64]  # [n + 1]: where each example's answers begin
    tokens: NDArray[Any]  # [S]: trained tokens
    scores: NDArray[np.float64]  # [S]: how good each is; of plain pairs 1 and 0
    reference: NDArray[np.float64] | None  # [S]: log-probs under the reference
    divergence: Divergence | None = None

    def numbers(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """The numbers of some examples' answers, in order."""
        parts = [np.arange(self.first[i], self.first[i + 1]) for i in indices]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def counts(self, indices: Sequence[int]) -> list[int]:
        """How many answers each of some examples has."""
        return [int(self.first[i + 1] - self.first[i]) for i in indices]

    def logps(
        self, policy: Tensor, real: Tensor, numbers: NDArray[np.int64], step_tokens: float
    ) -> AnswerLogps:
        """What a loss is given of a micro-batch's answers [S'].

        Args:
            policy: their log-probs [S'], which padding to a declared shape may follow.
            real: whether each is no padding [S'].
            numbers: of the answers that are no padding.
            step_tokens: see `AnswerLogps`.
        """

        def column(values: NDArray[Any]) -> Tensor:
            filled = np.ones(len(policy))
            filled[: len(numbers)] = values[numbers]
            return torch.from_numpy(filled).to(policy.dtype).to(policy.device)

        # Padding has log-probs of 0, at which some losses are not finite.
        policy = torch.where(real, policy, -1.0)
        reference = None if self.reference is None else column(self.reference)
        if reference is not None:
            reference = torch.where(real, reference, -1.0)
        return AnswerLogps(policy, reference, column(self.tokens), step_tokens, self.divergence)


def part_of(answers: AnswerLogps, rows: Any) -> AnswerLogps:
    """Some of the answers, by their places: a slice or a tensor of indices."""
    reference = answers.reference
    return AnswerLogps(
        answers.policy[rows],
        None if reference is None else reference[rows],
        answers.tokens[rows],
        answers.step_tokens,
        answers.divergence,
    )


def check_start(policy: Tensor, reference: Tensor, tolerance: float) -> None:
    """The step-0 check, of log-probs [S]: before training the policy is the reference.

    Raises UserError where they differ by more than `tolerance`, a share, explains. With B = 0 in
    the adapter any other difference is a mistake that training would silently build on.
    """
    gap = (policy - reference).abs()
    allowed = tolerance * (reference.abs() + 10.0)
    if bool((gap > allowed).any()):
        worst = int((gap - allowed).argmax())
        raise UserError(
            "step-0 check: before training, the policy must equal the reference, but a "
            f"log-probability is {float(policy[worst]):.4f} under the policy and "
            f"{float(reference[worst]):.4f} under the reference. Likely causes: an "
            "adapter that does not start at zero, trained parameters outside the adapter, "
            "dropout that is on, or a reference computed in another precision."
        )
