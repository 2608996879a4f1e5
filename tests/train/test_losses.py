"""Losses against values derived by hand and gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from tandem.train.losses.objectives import negative_log_likelihood
from tandem.train.losses.paired import sigmoid_loss


def _pairs(*rows: float) -> list[torch.Tensor]:
    return [torch.tensor([row], dtype=torch.float64, requires_grad=True) for row in rows]


def test_equal_policies_give_ln_2() -> None:
    result = sigmoid_loss(*_pairs(-5.0, -7.0, -5.0, -7.0), beta=0.1)
    assert result.loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert result.chosen_rewards.item() == result.rejected_rewards.item() == 0.0


def test_hand_derived_value() -> None:
    # beta * ((-4 + 5) - (-9 + 7)) = 0.5 * 3 = 1.5; loss = ln(1 + e^-1.5)
    result = sigmoid_loss(*_pairs(-4.0, -9.0, -5.0, -7.0), beta=0.5)
    assert result.loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-15)
    assert result.chosen_rewards.item() == pytest.approx(0.5)
    assert result.rejected_rewards.item() == pytest.approx(-1.0)


def test_gradient_pushes_the_two_answers_apart_equally() -> None:
    chosen, rejected, *reference = _pairs(-4.0, -9.0, -5.0, -7.0)
    sigmoid_loss(chosen, rejected, *reference, beta=0.5).loss.sum().backward()
    slope = -0.5 / (1 + math.exp(1.5))
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(slope, abs=1e-15)
    assert rejected.grad.item() == pytest.approx(-slope, abs=1e-15)


def test_far_margins_stay_finite() -> None:
    result = sigmoid_loss(*_pairs(-1e4, 0.0, 0.0, 0.0), beta=1.0)
    assert result.loss.item() == pytest.approx(1e4)


def test_negative_log_likelihood_is_a_sum() -> None:
    assert negative_log_likelihood(torch.tensor([-1.5, -2.0])).item() == 3.5
