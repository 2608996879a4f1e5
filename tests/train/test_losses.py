"""Losses against values derived by hand and gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from tandem.recipe.training_settings import DpoSettings
from tandem.train.losses import paired
from tandem.train.losses.objectives import negative_log_likelihood
from tandem.train.losses.registry import AnswerLogps, LossValue


def _answer(policy: float, reference: float) -> AnswerLogps:
    values = (
        torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (policy, reference)
    )
    return AnswerLogps(*values, tokens=torch.ones(1))


def _sigmoid(chosen: AnswerLogps, rejected: AnswerLogps, beta: float) -> LossValue:
    return paired.sigmoid(chosen, rejected, DpoSettings(beta=beta))


def test_equal_policies_give_ln_2() -> None:
    result = _sigmoid(_answer(-5.0, -5.0), _answer(-7.0, -7.0), 0.1)
    assert result.loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert result.metrics["rewards/chosen"].item() == result.metrics["rewards/rejected"].item() == 0


def test_hand_derived_value() -> None:
    # beta * ((-4 + 5) - (-9 + 7)) = 0.5 * 3 = 1.5; loss = ln(1 + e^-1.5)
    result = _sigmoid(_answer(-4.0, -5.0), _answer(-9.0, -7.0), 0.5)
    assert result.loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-15)
    assert result.metrics["rewards/chosen"].item() == pytest.approx(0.5)
    assert result.metrics["rewards/rejected"].item() == pytest.approx(-1.0)


def test_gradient_pushes_the_two_answers_apart_equally() -> None:
    chosen, rejected = _answer(-4.0, -5.0), _answer(-9.0, -7.0)
    _sigmoid(chosen, rejected, 0.5).loss.sum().backward()
    slope = -0.5 / (1 + math.exp(1.5))
    assert chosen.policy.grad is not None
    assert rejected.policy.grad is not None
    assert chosen.policy.grad.item() == pytest.approx(slope, abs=1e-15)
    assert rejected.policy.grad.item() == pytest.approx(-slope, abs=1e-15)


def test_far_margins_stay_finite() -> None:
    result = _sigmoid(_answer(-1e4, 0.0), _answer(0.0, 0.0), 1.0)
    assert result.loss.item() == pytest.approx(1e4)


def test_negative_log_likelihood_is_a_sum() -> None:
    assert negative_log_likelihood(torch.tensor([-1.5, -2.0])).item() == 3.5
