"""Whole rows and labelled answers through the DPO stage: what is compared, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from tandem.errors import UserError
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.evaluation_settings import EvaluationSettings
from tandem.recipe.training_settings import LoraSettings, ValidationSettings
from tandem.stages.dpo import run_dpo
from tandem.storage.atomic_files import read_json, read_jsonl

from ..invariants.made import double_precision
from ..jobs import training_job
from .made_inputs import WORDS, make_model_folder

QUIET = Console(quiet=True)
COMMON: dict[str, Any] = {
    "batch_size": 3, "max_steps": 2, "max_length": 128, "learning_rate": 1e-2, "beta": 0.5,
    "logging_steps": 1, "lora": LoraSettings(rank=2, alpha=4), "adam_epsilon": 1e-3,
}  # fmt: skip
# Scores of six rows; the third has two equal ones, the last only three answers.
SCORES = [[3, 1, 4, 2], [2, 7, 1, 8], [5, 5, 1, 3], [9, 2, 6, 5], [1, 2, 3, 4], [4, 1, 3]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("rows") / "model")


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        double_precision(patch)
        yield


def rows() -> list[dict[str, Any]]:
    """UltraFeedback's layout: a prompt with several scored answers."""
    rng = random.Random(5)
    return [
        {
            "instruction": f"say {' '.join(rng.choices(WORDS, k=4))} {number}",
            "completions": [
                {
                    "response": " ".join(rng.choices(WORDS, k=rng.randint(2, 9))),
                    "overall_score": score,
                }
                for score in scores
            ],
        }
        for number, scores in enumerate(SCORES)
    ]


def write(path: Path, some: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


def train(
    model: Path, folder: Path, data: DataSource, settings: dict[str, Any], **run: Any
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """The lines of metrics, and the trained adapter."""
    job = training_job(
        DpoSettings(**{**COMMON, "data": (data,), **settings}),
        model,
        folder,
        dtype="float64",
        seed=3,
        **run,
    )
    run_dpo(job, QUIET)
    return read_jsonl(folder / "metrics.jsonl"), load_file(folder / "adapter_model.safetensors")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert (tensor - expected[name]).norm() <= 1e-9 * expected[name].norm() + 1e-12, name


@pytest.mark.parametrize("completions", ["all_pairs", "best_vs_all"])
def test_a_row_trains_as_its_pairs_do_apart(model: Path, tmp_path: Path, completions: str) -> None:
    """In one step of all rows, whose prompts are then computed once each."""
    made = rows()
    apart = []
    for row in made:
        answers = sorted(row["completions"], key=lambda one: -one["overall_score"])
        for better, worse in itertools.combinations(answers, 2):
            if completions == "best_vs_all" and better is not answers[0]:
                continue
            if better["overall_score"] > worse["overall_score"]:
                texts = {"chosen": better["response"], "rejected": worse["response"]}
                apart.append({"prompt": row["instruction"], **texts})
    # One answer is as good as the best one, and is left out.
    whole = {"batch_size": len(made), "max_steps": 2, "max_dropped": 0.2}
    data = DataSource(path=str(write(tmp_path / "rows.jsonl", made)), completions=completions)
    lines, adapter = train(model, tmp_path / "rows", data, whole)
    pairs = DataSource(path=str(write(tmp_path / "pairs.jsonl", apart)))
    expected, other = train(model, tmp_path / "pairs", pairs, whole | {"batch_size": len(apart)})
    for mine, theirs in zip(lines, expected, strict=True):
        for name in theirs:
            if name == "loss" or "/" in name or name == "grad_norm":
                assert mine[name] == pytest.approx(theirs[name], rel=1e-9), name
        assert mine["tokens"] < theirs["tokens"]
    assert_same(adapter, other)
    assert read_json(tmp_path / "rows" / "summary.json")["reference_computed"] == len(made)


def plackett_luce(rewards: list[float], scores: list[float]) -> float:
    """Minus the log-probability of the ranking, by choosing the best of what is left."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    loss = 0.0
    for place in range(len(order)):
        left = [rewards[i] for i in order[place:]]
        loss -= rewards[order[place]] - math.log(sum(map(math.exp, left)))
    return loss


def softmax(values: list[float]) -> list[float]:
    total = sum(map(math.exp, values))
    return [math.exp(value) / total for value in values]


def test_losses_of_rows_have_values_derived_by_hand() -> None:
    from tandem.losses.answers import AnswerLogps
    from tandem.train.objectives.mixture import Mixture

    ratios, scores = [0.4, -1.0, 0.3, 2.0], [1.0, 4.0, 2.0, 3.0]
    policy = torch.tensor([-3.0] * 4, dtype=torch.float64)
    row = AnswerLogps(policy, policy - torch.tensor(ratios, dtype=torch.float64), torch.ones(4))
    rewards = [0.5 * ratio for ratio in ratios]
    target = softmax([score / 2 for score in scores])
    logs = [math.log(share) for share in softmax(rewards)]
    minus = [math.log1p(math.exp(reward)) for reward in rewards]
    expected = {
        "plackett_luce": plackett_luce(rewards, scores),
        "info_nca": -sum(t * log for t, log in zip(target, logs, strict=True)),
        "nca": sum(
            t * math.log1p(math.exp(-reward)) + m / 4
            for t, reward, m in zip(target, rewards, minus, strict=True)
        ),
    }
    for name, value in expected.items():
        options = {} if name == "plackett_luce" else {"score_temperature": 2.0}
        data = (DataSource(path="x", completions="ranked"),)
        settings = DpoSettings(loss=name, beta=0.5, data=data, **options)
        loss, _ = Mixture.of(settings).losses(row, torch.tensor(scores, dtype=torch.float64))
        assert loss.item() == pytest.approx(value, rel=1e-12), name


def test_answers_of_equal_scores_do_not_compete() -> None:
    from tandem.losses.answers import AnswerLogps
    from tandem.losses.listwise import plackett_luce as loss

    zero = torch.zeros(3, dtype=torch.float64)
    row = AnswerLogps(torch.tensor([0.1, 0.2, -0.4], dtype=torch.float64), zero, zero + 1)
    best, worst = (0.1, 0.2), -0.4
    expected = sum(math.log(math.exp(one) + math.exp(worst)) - one for one in best)
    scores = torch.tensor([1.0, 1.0, 0.0])
    assert loss(row, scores, beta=1.0).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["plackett_luce", "info_nca", "nca"])
def test_rows_do_not_depend_on_micro_batches(model: Path, tmp_path: Path, name: str) -> None:
    data = DataSource(path=str(write(tmp_path / "rows.jsonl", rows())), completions="ranked")
    first, a = train(model, tmp_path / "a", data, {"loss": name}, tokens_per_microbatch=4096)
    second, b = train(model, tmp_path / "b", data, {"loss": name}, tokens_per_microbatch=30)
    assert_same(a, b)
    for one, two in zip(first, second, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-9)
    if name == "plackett_luce":  # before training all rankings are equally likely
        numbers = [len(set(scores)) for scores in SCORES]
        assert first[0]["loss"] < math.log(math.factorial(max(numbers))) + 1e-9
    assert 0 <= first[-1]["rewards/accuracies"] <= 1


def labelled(count: int = 9) -> list[dict[str, Any]]:
    rng = random.Random(8)
    return [
        {
            "prompt": f"say {' '.join(rng.choices(WORDS, k=3))} {number}",
            "completion": " ".join(rng.choices(WORDS, k=rng.randint(2, 9))),
            "label": number % 3 != 0,
        }
        for number in range(count)
    ]


def test_kto_does_not_depend_on_micro_batches_and_sees_every_step_whole(
    model: Path, tmp_path: Path
) -> None:
    data = DataSource(path=str(write(tmp_path / "labels.jsonl", labelled())))
    settings = {
        "loss": "kto", "max_steps": 4, "undesirable_weight": 1.5, "learning_rate": 3e-2,
        "validation": ValidationSettings(fraction=0.3, steps=2),
    }  # fmt: skip
    first, a = train(model, tmp_path / "a", data, settings, tokens_per_microbatch=4096)
    second, b = train(model, tmp_path / "b", data, settings, tokens_per_microbatch=20)
    assert_same(a, b)
    for one, two in zip(first, second, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-9)
    # Policy and reference are equal at first: half of each answer's weight.
    assert first[0]["divergence/kto"] == 0.0
    assert max(line["divergence/kto"] for line in first) > 1e-4
    summaries = [read_json(tmp_path / name / "summary.json") for name in ("a", "b")]
    assert summaries[0]["micro_batches"] < summaries[1]["micro_batches"]
    # The records and each prompt with another's answer, trained on or held out.
    assert summaries[0]["reference_computed"] == 2 * 9


def test_pairs_are_two_labelled_answers_each(model: Path, tmp_path: Path) -> None:
    """The same as the rows that a user would write for them."""
    some = [
        {"prompt": f"say {WORDS[i]}", "chosen": " ".join(WORDS[: i + 2]), "rejected": WORDS[i]}
        for i in range(4)
    ]
    flat = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in some
        for side in ("chosen", "rejected")
    ]
    settings = {"loss": "apo_zero_unpaired", "batch_size": 4}
    results = []
    for name, data in (("pairs", some), ("flat", flat)):
        source = DataSource(path=str(write(tmp_path / f"{name}.jsonl", data)))
        results.append(train(model, tmp_path / name, source, settings))
    assert_same(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("loss", "data", "message"),
    [
        ("sigmoid", "labels", "no answer to the same prompt is labelled"),
        (
            "kto",
            "rows",
            "UltraFeedback.*labelled answers. Take a loss of pairs",
        ),
        ("kto", "conversations", "but this stage trains on labelled answers"),
        ("kto", "one", "there is only one record"),
    ],
)
def test_data_that_a_loss_cannot_use_is_refused(
    model: Path, tmp_path: Path, loss: str, data: str, message: str
) -> None:
    talk = [{"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"}]
    kinds: dict[str, list[dict[str, Any]]] = {
        "labels": labelled(4), "rows": rows(), "conversations": [{"messages": talk}],
        "one": labelled(1),
    }  # fmt: skip
    source = DataSource(path=str(write(tmp_path / "data.jsonl", kinds[data])))
    with pytest.raises(UserError, match=message):
        train(model, tmp_path / "out", source, {"loss": loss})


@pytest.mark.parametrize(
    ("loss", "completions", "message"),
    [
        ("plackett_luce", None, "compares all answers of a row, but x is read as pairs"),
        ("info_nca", "all_pairs", "set its completions to ranked"),
        ("sigmoid", "ranked", "completions: ranked is for losses of whole rows"),
    ],
)
def test_completions_that_do_not_fit_the_loss_are_refused(
    loss: str, completions: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DpoSettings(loss=loss, data=(DataSource(path="x", completions=completions),))


def test_answers_that_cannot_be_compared_leave_a_row(model: Path, tmp_path: Path) -> None:
    """A row of the plain layout: one answer is empty, one repeats another."""
    some = [
        {"prompt": "say red", "answers": ["red", " ", "red ", "blue"], "scores": [3, 2, 1, "0.5"]},
        {"prompt": "say blue", "answers": ["blue", "red"], "scores": [1, 1]},
        {"prompt": "say sun", "answers": ["sun", "sea"], "scores": [1, 0]},
    ]
    data = DataSource(path=str(write(tmp_path / "rows.jsonl", some)), completions="all_pairs")
    train(model, tmp_path / "out", data, {"max_dropped": 1.0, "batch_size": 2})
    entries = read_jsonl(tmp_path / "out" / "data-ledger.jsonl")
    assert [(one["row"], one["reason"]) for one in entries if "reason" in one] == [
        (1, "empty answer"),
        (1, "identical answers"),
        (2, "fewer than two answers that can be compared"),
    ]


def test_evaluation_compares_two_answers() -> None:
    with pytest.raises(ValueError, match="whole rows, and two answers are compared here"):
        EvaluationSettings(pairs=({"path": "x", "completions": "all_pairs"},))  # type: ignore[arg-type]


def test_a_plan_counts_what_a_loss_computes_besides() -> None:
    assert [DpoSettings(loss=name).reference_passes for name in ("sigmoid", "simpo", "kto")] == [
        1, 0, 2,
    ]  # fmt: skip
    assert [DpoSettings(loss=name).sees_steps for name in ("sigmoid", "aot", "kto")] == [
        False, True, True,
    ]  # fmt: skip
