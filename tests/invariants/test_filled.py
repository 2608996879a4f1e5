"""Micro-batches padded to declared shapes have the log-probs and gradients of the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tandem.data.batching.collate import MicroBatch, collate, record_key
from tandem.integrations.gaudi.static_shapes import Bucket, fill_up
from tandem.model.logprobs.sequence_logps import Scorer, sequence_logps

from .made import (
    adapt,
    attend,
    double_precision,
    gradients,
    largest_relative_error,
    make_model,
    make_trees,
    oracle_logps,
    recompute,
)

BUCKET = Bucket(rows=192, targets=120, sequences=16)
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}


def _scored(model: Any, batch: MicroBatch, weights: torch.Tensor) -> Any:
    """Real sequences' log-probs, and gradients of a weighted sum of all."""
    model.zero_grad()
    found = sequence_logps(model, batch)
    padded = torch.zeros(len(found), dtype=found.dtype)
    padded[: len(weights)] = weights
    # Fillers weigh in too: they must count nothing whatever the loss makes of them.
    padded[len(weights) :] = 3.0
    (found * padded).sum().backward()
    return found.detach(), gradients(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("backend", ["dense", "segments"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_filling_up_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    window: int | None,
    backend: str,
    checkpointing: bool,
) -> None:
    if dtype == torch.float64:
        double_precision(monkeypatch)
    plain = make_model(window=window, dtype=dtype)
    attend(plain, backend)
    model = adapt(plain, dropout=0.1)
    model.train()
    if checkpointing:
        recompute(model)
    trees = make_trees()
    batch = collate(trees, [record_key(1, 2, i) for i in range(len(trees))])
    weights = torch.randn(batch.sequences, dtype=torch.float64, generator=torch.manual_seed(2))
    logps, wanted = _scored(model, batch, weights)
    filled, found = _scored(model, fill_up(batch, BUCKET), weights)
    assert filled.shape == (BUCKET.sequences,)
    assert filled[batch.sequences :].eq(0).all()
    off = (filled[: batch.sequences] - logps).abs() / logps.abs()
    assert off.max() < LIMITS[dtype]
    assert largest_relative_error(found, wanted) < LIMITS[dtype]


def _seen_fillers(batch: MicroBatch) -> MicroBatch:
    """Every row sees the fillers as a prefix."""
    assert batch.spans is not None
    spans = batch.spans.clone()
    spans[1], spans[2] = batch.tokens - 9, batch.tokens
    return replace(batch, spans=spans)


def _counted_fillers(batch: MicroBatch) -> MicroBatch:
    """Filler targets belong to the first sequence."""
    sequence = batch.target_sequence
    return replace(batch, target_sequence=sequence.where(sequence < BUCKET.sequences, 0))


def _forgotten_prefix(batch: MicroBatch) -> MicroBatch:
    """The spans lack the prefixes."""
    assert batch.spans is not None
    return replace(batch, spans=torch.stack([batch.spans[0], *torch.zeros_like(batch.spans[1:])]))


@pytest.mark.parametrize("fault", [_seen_fillers, _counted_fillers, _forgotten_prefix])
def test_the_comparison_notices_faults(fault: Any) -> None:
    trees = make_trees()
    model = make_model()
    with torch.no_grad():
        wanted = oracle_logps(model, trees)
        attend(model, "dense")
        filled = fill_up(collate(trees), BUCKET)
        right = sequence_logps(model, filled)[: len(wanted)]
        wrong = sequence_logps(model, fault(filled))[: len(wanted)]
    assert (right - wanted).abs().max() < 1e-6
    assert (wrong - wanted).abs().max() > 1e-4


def test_sums_without_float64_are_rounded_once() -> None:
    """Long answers, summed as a device without float64 does it: half a unit in the last place."""
    logps = -torch.rand(40_000, generator=torch.manual_seed(3)) * 0.2
    targets = torch.arange(40_000) // 20_000

    batch = collate(make_trees()[:1])
    long = replace(batch, target_sequence=targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "tandem.model.logprobs.sequence_logps.token_logps", lambda *_: logps.requires_grad_()
        )
        exact = Scorer(torch.nn.Identity())(long)
        found = Scorer(torch.nn.Identity(), sums=torch.float32)(long)
    assert (exact.dtype, found.dtype) == (torch.float64, torch.float32)
    wanted = exact.detach()
    unit = torch.finfo(torch.float32).eps * float(wanted.abs().max())
    assert float((found.detach().double() - wanted).abs().max()) <= unit / 2
    naive = torch.zeros(2).index_add(0, targets, logps.detach())
    assert float((naive.double() - wanted).abs().max()) > 4 * unit, "plain sums are worse"
    found.sum().backward()
    assert logps.grad is not None
    assert logps.grad.eq(1).all()
