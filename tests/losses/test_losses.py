"""Losses against values derived by hand, against TRL's functions, and against differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.losses.answers import AnswerLogps, divergence_of
from tandem.losses.known import find_loss
from tandem.losses.registry import PREFERENCE_LOSSES
from tandem.recipe.dpo_settings import DpoSettings
from tandem.train.objectives.mixture import Mixture
from tandem.train.objectives.supervised import negative_log_likelihood, probability_weighted

# One pair: log-probs under the policy and the reference, and tokens, of the chosen answer and of
# the rejected one. So r_w = 1, r_l = -2, delta = 3; per token 1/4 and -2/5.
CHOSEN, REJECTED = (-4.0, -5.0, 4), (-9.0, -7.0, 5)
BETA = 0.5


def answer(policy: float, reference: float, tokens: int, step_tokens: float = 2.0) -> AnswerLogps:
    values = (
        torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (policy, reference)
    )
    return AnswerLogps(*values, torch.tensor([float(tokens)], dtype=torch.float64), step_tokens)


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


# Each loss of the pair above, written out with numbers: delta = 3, beta = 0.5.
BY_HAND: dict[str, tuple[dict[str, Any], float]] = {
    "sigmoid": ({}, softplus(-1.5)),
    "sigmoid, smoothed": ({"label_smoothing": 0.1}, 0.9 * softplus(-1.5) + 0.1 * softplus(1.5)),
    "sigmoid_norm": ({"beta": 5.0}, softplus(-5 * (1 / 4 + 2 / 5))),
    "robust": (
        {"label_smoothing": 0.1},
        (0.9 * softplus(-1.5) - 0.1 * softplus(1.5)) / 0.8,
    ),
    "hinge": ({}, 0.0),
    "hinge, beta 0.1": ({"beta": 0.1}, 0.7),
    "ipo": ({}, (1 / 4 + 2 / 5 - 1) ** 2),
    "dpo_positive": ({}, softplus(-1.5)),  # the chosen answer has not fallen
    "apo_zero": ({}, 1 - sigmoid(0.5) + sigmoid(-1)),
    "apo_down": ({}, sigmoid(0.5) + 1 - sigmoid(1.5)),
    "exo_pair": (
        {"label_smoothing": 0.1},
        sigmoid(1.5) * (-softplus(-1.5) - math.log(0.9))
        + sigmoid(-1.5) * (-softplus(1.5) - math.log(0.1)),
    ),
    "nca_pair": ({}, softplus(-0.5) + 0.5 * softplus(0.5) + 0.5 * softplus(-1)),
    "bco_pair": ({}, softplus(-0.5) + softplus(-1)),
    "sppo_hard": ({}, (1 - 1) ** 2 + (-2 + 1) ** 2),
    "discopop": (
        {"discopop_tau": 2.0},
        (1 - sigmoid(0.75)) * softplus(-1.5) + sigmoid(0.75) * math.exp(-1.5),
    ),
    "sft": ({}, 4 / 2),
    "sft_norm": ({}, 4 / 4),
    "simpo": ({"beta": 2.0, "simpo_gamma": 0.3}, softplus(-(2 * (-1 + 9 / 5) - 0.3))),
    "cpo": ({"cpo_alpha": 0.25}, softplus(-2.5) + 0.25 * 4 / 2),
    "orpo": ({}, 4 / 2 + 0.5 * softplus(-(odds(-1) - odds(-9 / 5)))),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_values_derived_by_hand(case: str) -> None:
    options, expected = BY_HAND[case]
    assert loss_of(case.partition(",")[0], options).item() == pytest.approx(expected, abs=1e-14)


def settings_of(name: str, options: Mapping[str, Any]) -> DpoSettings:
    """Settings of a loss, with the beta of this page if it has one."""
    beta = {"beta": BETA} if "beta" in find_loss(name).options else {}
    return DpoSettings(loss=name, **{**beta, **options})


def loss_of(name: str, options: Mapping[str, Any]) -> Tensor:
    total, parts = Mixture.of(settings_of(name, options)).losses(answer(*CHOSEN), answer(*REJECTED))
    assert parts == {}
    return total


def test_every_loss_has_a_value_derived_by_hand() -> None:
    """Those of steps, of single answers and of rows have tests of their own."""
    others = {"aot", "aot_unpaired", "kto", "apo_zero_unpaired", "plackett_luce", "info_nca", "nca"}
    assert {case.partition(",")[0] for case in BY_HAND} | others == PREFERENCE_LOSSES.keys()


def test_a_chosen_answer_that_falls_costs_more_under_dpo_positive() -> None:
    # r_w = -1, r_l = -2: beta * (1 - lambda * 1) = 0.5 * (1 - 3)
    mixture = Mixture.of(DpoSettings(loss="dpo_positive", beta=BETA, dpop_lambda=3.0))
    total, _ = mixture.losses(answer(-6.0, -5.0, 4), answer(*REJECTED))
    assert total.item() == pytest.approx(softplus(1.0), abs=1e-14)


def test_labelled_answers_by_hand() -> None:
    """A good answer with r = 1 and a bad one with r = -2, the divergence 0.5."""
    answers = AnswerLogps(
        torch.tensor([-4.0, -9.0], dtype=torch.float64),
        torch.tensor([-5.0, -7.0], dtype=torch.float64),
        torch.ones(2),
    )
    good, weights = (
        torch.tensor([True, False]),
        {"desirable_weight": 2.0, "undesirable_weight": 3.0},
    )
    expected = {
        "kto": [2 * (1 - sigmoid(0.25)), 3 * (1 - sigmoid(1.25))],
        "apo_zero_unpaired": [2 * (1 - sigmoid(0.5)), 3 * sigmoid(-1)],
    }
    for name, values in expected.items():
        mixture = Mixture.of(DpoSettings(loss=name, beta=BETA, **weights))
        known = (torch.tensor(0.5, dtype=torch.float64),) if name == "kto" else ()
        total, _ = mixture.losses(answers, good, statistics=known)
        assert total.tolist() == pytest.approx(values, abs=1e-14)
    # Answers to other prompts that became less likely estimate no divergence below 0.
    (estimate,) = Mixture.of(DpoSettings(loss="kto")).statistics(answers)
    assert estimate is not None
    assert estimate.item() == 0.0


def test_a_mixture_is_the_weighted_sum_and_names_its_parts() -> None:
    settings = DpoSettings(loss={"sigmoid": 1, "sft": 0.1}, beta=BETA)
    total, parts = Mixture.of(settings).losses(answer(*CHOSEN), answer(*REJECTED))
    assert total.item() == pytest.approx(softplus(-1.5) + 0.1 * 2, abs=1e-14)
    assert parts["loss/sigmoid"].item() == pytest.approx(softplus(-1.5), abs=1e-14)
    assert parts["loss/sft"].item() == 2.0


def test_gradients_equal_differences() -> None:
    for case, (options, _) in BY_HAND.items():
        mixture = Mixture.of(settings_of(case.partition(",")[0], options))

        def total(chosen: Tensor, rejected: Tensor, mixture: Mixture = mixture) -> Tensor:
            pair = (
                AnswerLogps(policy, torch.tensor([reference]), torch.tensor([float(tokens)]), 2.0)
                for policy, (_, reference, tokens) in (
                    (chosen, CHOSEN),
                    (rejected, REJECTED),
                )
            )
            return mixture.losses(*pair)[0]

        inputs = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-4.3, -8.9)]
        assert torch.autograd.gradcheck(total, inputs), case


def test_far_margins_stay_finite() -> None:
    for name in ("sigmoid", "nca_pair", "bco_pair", "simpo", "orpo", "cpo"):
        mixture = Mixture.of(DpoSettings(loss=name, beta=1.0))
        chosen, rejected = answer(-1e4, -1.0, 3), answer(-1e-9, -1.0, 3)
        total, _ = mixture.losses(chosen, rejected)
        total.sum().backward()
        assert chosen.policy.grad is not None
        assert math.isfinite(total.item()), name
        assert math.isfinite(chosen.policy.grad.item()), name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # f'(t) of t = e and t = e^-2, without the constants that cancel
        ("forward_kl", (1 - math.exp(-1)) - (1 - math.exp(2))),
        ("js_divergence", -softplus(-1) + softplus(2)),
        ("alpha_divergence", (math.exp(-0.5) - 1) / -0.5 - (math.exp(1) - 1) / -0.5),
    ],
)
def test_f_divergences(name: Any, expected: float) -> None:
    settings = DpoSettings(loss="sigmoid", beta=BETA, f_divergence_type=name)
    mixture = Mixture.of(settings)
    pair = [
        AnswerLogps(one.policy, one.reference, one.tokens, 1.0, mixture.divergence)
        for one in (answer(*CHOSEN), answer(*REJECTED))
    ]
    total, _ = mixture.losses(*pair)
    assert total.item() == pytest.approx(softplus(-BETA * expected), rel=1e-12)
    assert divergence_of("alpha_divergence", 1.0) is None


def test_ranks_of_a_step_match_margins_with_the_references() -> None:
    """AOT on a step of 7 pairs, in micro-batches of 3 and 4, against sorting the whole step."""
    generator = torch.Generator().manual_seed(0)
    values = [-torch.rand(7, generator=generator, dtype=torch.float64) * 9 for _ in range(4)]
    chosen, rejected, ref_chosen, ref_rejected = values
    sorted_of = {
        "aot": ((chosen - rejected), (ref_chosen - ref_rejected)),
        "aot_unpaired": ((chosen - ref_chosen), (rejected - ref_rejected)),
    }
    for name, (left, right) in sorted_of.items():
        mixture = Mixture.of(DpoSettings(loss=name, beta=BETA, label_smoothing=0.2))
        delta = BETA * (left.sort().values - right.sort().values)
        plus = torch.nn.functional.softplus
        expected = (0.8 * plus(-delta) + 0.2 * plus(delta)).sum()
        policy = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
        oracle = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]

        def pair(part: slice, policy: list[Tensor] = policy) -> list[AnswerLogps]:
            references = (ref_chosen, ref_rejected)
            return [
                AnswerLogps(p[part], r[part], torch.ones(7)[part])
                for p, r in zip(policy, references, strict=True)
            ]

        with torch.no_grad():
            (whole,) = mixture.statistics(*pair(slice(None)))
        assert whole is not None
        total = sum(
            mixture.losses(*pair(part), statistics=(whole[part],))[0].sum()
            for part in (slice(0, 3), slice(3, 7))
        )
        assert isinstance(total, Tensor)
        torch.testing.assert_close(total, expected)
        total.backward()
        theirs = {
            "aot": lambda c, r: ((c - r), (ref_chosen - ref_rejected)),
            "aot_unpaired": lambda c, r: ((c - ref_chosen), (r - ref_rejected)),
        }[name](*oracle)
        delta = BETA * (theirs[0].sort().values - theirs[1].sort().values)
        (0.8 * plus(-delta) + 0.2 * plus(delta)).sum().backward()
        for mine, other in zip(policy, oracle, strict=True):
            torch.testing.assert_close(mine.grad, other.grad)


def test_losses_without_a_reference_equal_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's trainers of these losses add the likelihood elsewhere."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    generator = torch.Generator().manual_seed(1)
    chosen, rejected = (
        -torch.rand(5, generator=generator, dtype=torch.float64) * 20 - 1 for _ in range(2)
    )
    tokens = [torch.tensor([3.0, 9, 1, 4, 7]), torch.tensor([2.0, 2, 8, 5, 1])]
    pair = [AnswerLogps(p, None, t, 1.0) for p, t in zip((chosen, rejected), tokens, strict=True)]
    likelihood = -chosen
    trainer: Any = SimpleNamespace(
        alpha=0.0, beta=BETA, label_smoothing=0.1, simpo_gamma=0.7,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    means = [p / t for p, t in zip((chosen, rejected), tokens, strict=True)]
    for name, logps in (("simpo", means), ("cpo", [chosen, rejected])):
        trainer.loss_type = "simpo" if name == "simpo" else "sigmoid"
        expected = CPOTrainer.cpo_loss(trainer, *logps)[0]
        options: dict[str, Any] = {"simpo_gamma": 0.7} if name == "simpo" else {"cpo_alpha": 2.0}
        settings = DpoSettings(loss=name, beta=BETA, label_smoothing=0.1, **options)
        total, _ = Mixture.of(settings).losses(*pair)
        more = 0.0 if name == "simpo" else 2.0 * likelihood
        torch.testing.assert_close(total, expected + more)
    gain = ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
    total, _ = Mixture.of(DpoSettings(loss="orpo", beta=BETA)).losses(*pair)
    torch.testing.assert_close(total, likelihood - gain.double(), rtol=1e-6, atol=1e-6)


def test_negative_log_likelihood_is_a_sum_and_dft_weighs_by_probability() -> None:
    assert negative_log_likelihood(torch.tensor([-1.5, -2.0])).item() == 3.5
    logps = torch.tensor([-1.5, -0.25], requires_grad=True)
    weighted = probability_weighted(logps)
    assert weighted.tolist() == pytest.approx([-1.5 * math.exp(-1.5), -0.25 * math.exp(-0.25)])
    weighted.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([math.exp(-1.5), math.exp(-0.25)])


def test_an_unknown_loss_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no loss 'sigmiod'\. Did you mean 'sigmoid'\? Losses: "):
        find_loss("sigmiod")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": {"sigmoid": 0.0}}, "the weight of sigmoid is 0, and must be above 0"),
        ({"loss": {"sigmoid": 1, "sft": -0.1}}, "the weight of sft is -0.1"),
        ({"loss": {}}, "no loss is named"),
        (
            {"loss": "hinge", "label_smoothing": 0.1},
            "label_smoothing has no effect with loss hinge",
        ),
        ({"loss": "robust"}, r"loss robust needs label_smoothing; 0\.1 is usual"),
        ({"loss": "simpo", "f_divergence_type": "forward_kl"}, "f_divergence_type has no effect"),
        (
            {"f_alpha_divergence_coef": 0.2},
            "no effect with another f_divergence_type than alpha",
        ),
        ({"loss": {"kto": 1, "sft": 1}}, "losses of different things, and cannot be mixed"),
        ({"loss": "kto", "ld_alpha": 0.5}, "ld_alpha has no effect with loss kto"),
    ],
)
def test_settings_that_do_not_fit_the_loss_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DpoSettings(**settings)
