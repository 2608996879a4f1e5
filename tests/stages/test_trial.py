"""A small model is tried as a run would train it, its seconds set against its operations."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np
import pytest
from transformers import GPT2Config, LlamaConfig, MambaConfig

from tandem.data.batching.sampler import StepSampler, WeightedSource
from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.tokenize.vocabulary import AddedTokens
from tandem.integrations.choose import choose_device
from tandem.plan import trial
from tandem.plan.model_shape import described
from tandem.plan.trial import Trial, made_up
from tandem.plan.workload import Asked, count_operations, count_work, guess_work
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import DpoSettings, LoraSettings, SftSettings, TrainingSettings

_SMALL: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
_LLAMA = LlamaConfig(**_SMALL)
_ASKED = Asked(8, 1.0, None, seed=3, budget=30, processes=1, attention_weight=0.0)


def _trial(config: Any = _LLAMA, settings: TrainingSettings | None = None, **changes: Any) -> Trial:
    values = {
        "attention": "auto", "dropout": True, "copies": 0,
        "added": AddedTokens(), "trains_added": True,
    } | changes  # fmt: skip
    settings = settings or SftSettings(
        data=(DataSource(path="x"),), lora=LoraSettings(rank=2, alpha=4)
    )
    shape = described(
        config,
        rank=settings.lora.rank,
        alpha=settings.lora.alpha,
        target_modules=settings.lora.target_modules,
        attention=values["attention"],
        added=values["added"],
        trains_added=values["trains_added"],
    ).shape
    return Trial(
        config=config,
        shape=shape,
        settings=settings,
        device=choose_device("cpu", "float32"),
        **values,
    )


def _trees(count: int = 20, tokens: int = 12) -> EncodedDataset:
    return made_up(count, tokens, 0.5, vocabulary=90)


def test_all_operations_of_a_step_are_set_against_its_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []

    def take(_: Trial, __: Any, ___: EncodedDataset, members: Any) -> float:
        taken.append(len(members))
        return 0.125 if len(taken) % 2 else 0.01

    monkeypatch.setattr(Trial, "_take", take)
    trees, one = _trees(), _trial()
    rate = one.rate(trees, _ASKED, most=inf)
    assert rate is not None
    # A record feeds 11 tokens, so that two fit into 30; after one to warm up each is taken twice.
    assert taken == [2] * 9
    (first,) = StepSampler(20, 8, seed=3).steps(0, 1)
    whole = count_work(trees.select(np.sort(np.array(first.examples))), _ASKED)
    assert (whole.tokens, whole.micro_batches) == (8 * 11, 4)
    found = count_operations(one.shape, whole, reference=False, checkpointing=False)
    assert rate.operations == pytest.approx(found.training / (4 * 0.01))
    assert (rate.measured, rate.source) == (
        None, "a trial of a model of this shape with random weights",
    )  # fmt: skip


@pytest.mark.parametrize("weight", [1.5, 2.0, 3.0])
def test_a_record_that_a_step_repeats_is_tried_and_counted_as_often(
    weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees, one = _trees(), _trial()
    asked = replace(_ASKED, batch_size=30, budget=60, parts=(WeightedSource(20, weight),))
    (first,) = StepSampler(20, 30, seed=3, sources=asked.parts).steps(0, 1)
    assert len(set(first.examples)) < len(first.examples) == 30
    rate = one.rate(trees, asked, most=inf)
    assert rate is not None
    assert rate.operations > 0
    taken: list[int] = []

    def take(_: Trial, __: Any, ___: EncodedDataset, members: Any) -> float:
        taken.extend(members)
        return 0.01

    monkeypatch.setattr(Trial, "_take", take)
    rate = one.rate(trees, asked, most=inf)
    assert rate is not None
    assert {*taken} == {*first.examples}
    whole = count_work(trees, replace(asked, max_steps=1))
    assert (whole.tokens, whole.micro_batches) == (30 * 11, 6)
    found = count_operations(one.shape, whole, reference=False, checkpointing=False)
    assert rate.operations == pytest.approx(found.training / (6 * 0.01))


@pytest.mark.parametrize(
    ("seconds", "times"),
    [
        # The first alone says enough.
        (5.0, [5.0]),
        # It has warmed up; the one after it says enough.
        (0.75, [0.75, 0.75]),
        # A second has passed, and no further micro-batch is begun.
        (0.4, [0.4] * 3),
        (0.22, [0.22] * 5),
    ],
)
def test_a_trial_ends_with_the_pass_in_which_a_second_has_passed(
    seconds: float, times: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[float] = []

    def take(_: Trial, __: Any, ___: EncodedDataset, ____: Any) -> float:
        taken.append(seconds)
        return seconds

    monkeypatch.setattr(Trial, "_take", take)
    rate = _trial().rate(_trees(), _ASKED, most=inf)
    assert taken == times
    assert rate is not None
    whole = count_work(_trees(2), _ASKED)
    found = count_operations(_trial().shape, whole, reference=False, checkpointing=False)
    assert rate.operations == pytest.approx(found.training / seconds)


def test_large_models_and_large_micro_batches_have_no_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []

    def take(_: Trial, __: Any, ___: EncodedDataset, members: Any) -> float:
        taken.append(len(members))
        return 0.01

    monkeypatch.setattr(Trial, "_take", take)
    one = _trial()
    whole = count_work(_trees(2), _ASKED)
    found = count_operations(one.shape, whole, reference=False, checkpointing=False).training
    assert one.rate(_trees(), _ASKED, most=0.99 * found) is None
    assert taken == []
    assert one.rate(_trees(), _ASKED, most=1.01 * found) is not None
    taken.clear()
    monkeypatch.setattr(trial, "_LARGEST", 1000)
    assert one.rate(_trees(), _ASKED, most=inf) is None
    assert taken == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"copies": 1000},
        {
            "settings": SftSettings(
                data=(DataSource(path="x"),), lora=LoraSettings(rank=2, alpha=4, dropout=0.5)
            )
        },
        {
            "settings": DpoSettings(
                data=(DataSource(path="x"),), lora=LoraSettings(rank=2, alpha=4),
                gradient_checkpointing=True,
            ),
            "dropout": False,
        },
        {"added": AddedTokens({"a": 90, "b": 91}, {"c": 3})},
        {"added": AddedTokens({"a": 90, "b": 91}, {"c": 3}), "trains_added": False},
        {"config": GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4)},
        {"config": MambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2)},
        {"attention": "padded"},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)  # fmt: skip
def test_what_a_run_trains_can_be_tried(changes: dict[str, Any]) -> None:
    one = _trial(**changes)
    padded = changes.get("attention") == "padded" or "config" in changes
    rate = one.rate(_trees(), replace(_ASKED, padded=padded), most=inf)
    assert rate is not None
    assert rate.operations > 0


def test_made_up_records_are_those_that_were_guessed() -> None:
    trees = made_up(1000, 120, 0.5, vocabulary=90)
    assert len(trees) == trial._MADE_UP
    assert all(tree.branches[0].input_ids.max() < 90 for tree in trees)
    asked = replace(_ASKED, batch_size=len(trees))
    real = count_work(trees, asked)
    guessed = guess_work(len(trees), 120, asked, answers=0.5)
    assert real.targets == guessed.targets
    assert real.tokens == guessed.tokens - len(trees)  # the last target is not fed
