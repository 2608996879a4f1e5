"""Keyed dropout: right rates, no visible structure, the same mask whatever the schedule."""

from __future__ import annotations

import pytest
import torch

from tandem.data.batching.collate import collate, record_key
from tandem.model.lora.forward import DropoutKeys, KeyedDropout, keep_mask, switch_dropout_off

from ..data.test_collate import PAIR, TALK


def test_rates_and_correlations_are_those_of_independent_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (1500,), generator=generator)
    channels = (torch.randint(-(2**31), 2**31, (700,), generator=generator) | 1).to(torch.int32)
    for p in (0.05, 0.5):
        mask = keep_mask(keys, channels, p).double()
        assert mask.mean().item() == pytest.approx(1 - p, abs=0.002)
        # A row's rate over 700 channels, a column's over 1500 rows: their standard errors.
        spread = (p * (1 - p)) ** 0.5
        assert mask.mean(1).std().item() == pytest.approx(spread / 700**0.5, rel=0.15)
        assert mask.mean(0).std().item() == pytest.approx(spread / 1500**0.5, rel=0.15)
        centred = (mask - mask.mean(0)) / mask.std(0)
        correlation = (centred.T @ centred / 1500).fill_diagonal_(0)
        assert correlation.std().item() == pytest.approx(1500**-0.5, rel=0.15)


def test_a_record_draws_the_same_mask_alone_and_in_company() -> None:
    shared = DropoutKeys()
    dropout = KeyedDropout(0.3, module_number=4, shared=shared).train()
    keys = [record_key(1, 2, 3), record_key(1, 2, 4)]
    shared.keys = collate([TALK, PAIR], keys).dropout_keys
    together = dropout(torch.ones(1, 10, 16))
    shared.keys = collate([PAIR], keys[1:]).dropout_keys
    alone = dropout(torch.ones(1, 5, 16))
    assert torch.equal(together[:, 5:], alone)
    assert alone.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    other = KeyedDropout(0.3, module_number=5, shared=shared).train()
    assert not torch.equal(other(torch.ones(1, 5, 16)), alone)


def test_a_base_models_own_dropout_is_turned_off() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20)).train()
    ids = torch.arange(12)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert switch_dropout_off(model) == 4
    assert torch.equal(model.transformer.drop(torch.ones(9)), torch.ones(9))
    assert switch_dropout_off(model) == 0


def test_off_in_evaluation_and_loud_without_keys() -> None:
    dropout = KeyedDropout(0.3, 0, DropoutKeys())
    ones = torch.ones(1, 2, 4)
    assert dropout.eval()(ones) is ones
    with pytest.raises(ValueError, match="no dropout keys"):
        dropout.train()(ones)
