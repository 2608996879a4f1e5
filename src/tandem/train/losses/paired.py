"""Preference losses as functions of sequence log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """Per-pair results, each [P]: the loss, and the implicit rewards (detached)."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def sigmoid_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float,
) -> PreferenceLoss:
    """The DPO loss, equation 7 of arXiv 2305.18290.

    Args:
        policy_chosen, policy_rejected: log pi(y|x) summed over the answer's tokens [P].
        reference_chosen, reference_rejected: the same under the reference model [P].
        beta: strength of the pull towards the reference.
    """
    chosen_ratio = policy_chosen - reference_chosen
    rejected_ratio = policy_rejected - reference_rejected
    loss = -F.logsigmoid(beta * (chosen_ratio - rejected_ratio))
    return PreferenceLoss(
        loss=loss,
        chosen_rewards=beta * chosen_ratio.detach(),
        rejected_rewards=beta * rejected_ratio.detach(),
    )
