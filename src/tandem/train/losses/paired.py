"""Losses that compare a chosen and a rejected answer to one prompt."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tandem.recipe.training_settings import DpoSettings
from tandem.train.losses.registry import AnswerLogps, LossValue, preference_loss


@preference_loss("sigmoid", reference=True)
def sigmoid(chosen: AnswerLogps, rejected: AnswerLogps, settings: DpoSettings) -> LossValue:
    """The DPO loss, equation 7 of arXiv 2305.18290."""
    loss = -F.logsigmoid(settings.beta * (chosen.ratio - rejected.ratio))
    return LossValue(loss, rewards(chosen, rejected, settings.beta))


def rewards(chosen: AnswerLogps, rejected: AnswerLogps, beta: float) -> dict[str, Tensor]:
    """The implicit rewards of both answers, their margin, and whether it is positive [P]."""
    of_chosen, of_rejected = beta * chosen.ratio.detach(), beta * rejected.ratio.detach()
    margins = of_chosen - of_rejected
    return {
        "rewards/chosen": of_chosen,
        "rewards/rejected": of_rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins.dtype),
    }
