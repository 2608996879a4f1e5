"""NEFTune's noise: as large as it should be, without structure, and the same whatever the schedule.

`invariants/test_methods.py` trains with it under several budgets, processes and engines.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tandem.data.batching.collate import collate, record_key
from tandem.model.logprobs.sequence_logps import sequence_logps
from tandem.model.lora.forward import set_dropout_keys
from tandem.model.lora.input_noise import add_noise, channel_constants, uniform
from tandem.recipe.dpo_settings import DpoSettings

from ..data.test_collate import PAIR, TALK
from ..invariants.made import attend, make_model

CPU = torch.device("cpu")


def test_it_is_uniform_and_every_number_is_drawn_alone() -> None:
    keys = torch.randint(-(2**63), 2**63 - 1, (1500,), generator=torch.manual_seed(0))
    noise = uniform(keys, channel_constants(700, CPU)).double()
    assert -1 <= noise.min() < -0.9999
    assert 0.9999 < noise.max() < 1
    assert noise.mean().item() == pytest.approx(0, abs=0.003)
    for power in (2, 4, 6):  # moments of a uniform distribution
        assert noise.pow(power).mean().item() == pytest.approx(1 / (power + 1), rel=0.01)
    spread = 3**-0.5
    assert noise.mean(1).std().item() == pytest.approx(spread / 700**0.5, rel=0.15)
    assert noise.mean(0).std().item() == pytest.approx(spread / 1500**0.5, rel=0.15)
    for table, count in ((noise, 1500), (noise.T, 700)):
        centred = (table - table.mean(0)) / table.std(0)
        correlation = (centred.T @ centred / count).fill_diagonal_(0)
        assert correlation.std().item() == pytest.approx(count**-0.5, rel=0.15)
        assert correlation.abs().max() < 6 * count**-0.5


def test_neighbouring_tokens_of_a_record_have_noise_of_their_own() -> None:
    keys = collate([TALK] * 40, [record_key(1, 0, i) for i in range(40)]).dropout_keys
    assert keys is not None
    noise = uniform(keys, channel_constants(64, CPU))
    assert len(noise.unique(dim=0)) == len(keys)
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.01


def embedded(model: Any, batch: Any) -> torch.Tensor:
    set_dropout_keys(model, batch.dropout_keys, batch.record_tokens)
    found: torch.Tensor = model.get_input_embeddings()(batch.input_ids[None])
    return found[0].detach()


def test_its_size_follows_the_tokens_of_the_record_not_of_the_micro_batch() -> None:
    """alpha / sqrt(L d): the largest of many numbers comes near it, and none is beyond."""
    model, alpha = make_model(), 5.0
    keys = [record_key(1, 2, 3), record_key(1, 2, 4)]
    plain = model.get_input_embeddings().weight.detach()[
        collate([TALK, PAIR]).input_ids
    ]  # fmt: skip
    add_noise(model, alpha)
    both = embedded(model.train(), collate([TALK, PAIR], keys)) - plain
    start = 0
    for example in (TALK, PAIR):
        own = both[start : start + example.fed]
        limit = alpha / math.sqrt(example.fed * own.shape[1])
        assert 0.95 * limit < own.abs().max() <= limit
        start += example.fed
    alone = embedded(model, collate([PAIR], keys[1:])) - plain[TALK.fed :]
    assert torch.equal(alone, both[TALK.fed :])
    other = embedded(model, collate([PAIR], [record_key(1, 3, 4)])) - plain[TALK.fed :]
    assert not torch.equal(other, alone)


def test_padded_rows_carry_the_same_noise_as_packed_ones() -> None:
    """Also where branches share a prefix, whose rows a padded model reads once for each."""
    batch = collate([TALK, PAIR], [record_key(1, 2, 3), record_key(1, 2, 4)])
    found = []
    for backend in ("segments", "padded"):
        model = make_model()
        attend(model, backend)
        add_noise(model, 5.0)
        with torch.no_grad():
            found.append(sequence_logps(model.train(), batch))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_pairs_have_none() -> None:
    """Their prompts are shared, and the reference must equal the policy at the start."""
    with pytest.raises(ValidationError, match="neftune_alpha"):
        DpoSettings(neftune_alpha=5.0)  # type: ignore[call-arg]


def test_scores_are_without_it_and_training_is_loud_without_keys() -> None:
    model, batch = make_model(), collate([TALK, PAIR])
    attend(model, "segments")
    with torch.no_grad():
        before = sequence_logps(model.eval(), batch)
        add_noise(model, 5.0)
        assert torch.equal(sequence_logps(model.eval(), batch), before)
        drawn = collate([TALK, PAIR], [1, 2])
        assert not torch.equal(sequence_logps(model.train(), drawn), before)
        with pytest.raises(ValueError, match="noise is on but the micro-batch carries no keys"):
            sequence_logps(model.train(), batch)
