"""Log-probs and gradients over packed trees equal one sequence at a time through full logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tandem.data.batching.collate import MicroBatch, Segment, collate
from tandem.data.encoded.example import Branch, Example
from tandem.model.logprobs.sequence_logps import sequence_logps, token_logps

from .made import (
    VOCABULARY,
    adapt,
    attend,
    double_precision,
    gradients,
    largest_relative_error,
    make_model,
    make_trees,
    oracle_logps,
    recompute,
    without_sharing,
)


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("backend", ["segments", "dense"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_equals_the_oracle_in_float64(
    monkeypatch: pytest.MonkeyPatch,
    window: int | None,
    backend: str,
    shared: bool,
    checkpointing: bool,
) -> None:
    double_precision(monkeypatch)
    trees = make_trees()
    reference = adapt(make_model(window=window))
    wanted = oracle_logps(reference, trees)
    weights = torch.randn(len(wanted), dtype=torch.float64, generator=torch.manual_seed(2))
    (wanted * weights).sum().backward()

    plain = make_model(window=window)
    attend(plain, backend)
    model = adapt(plain)
    if checkpointing:
        recompute(model)
        model.train()
    fed = trees if shared else [part for tree in trees for part in without_sharing(tree)]
    found = sequence_logps(model, collate(fed))
    (found * weights).sum().backward()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert largest_relative_error(gradients(model), gradients(reference)) < 1e-9


@pytest.mark.parametrize("backend", ["segments", "dense"])
def test_other_records_do_not_move_by_a_bit(backend: str) -> None:
    model = make_model(dtype=torch.float32)
    attend(model, backend)
    trees = make_trees()
    with torch.no_grad():
        before = token_logps(model, collate(trees))
        changed = list(trees)
        tree = trees[2]
        old = tree.prefix
        ids = (old.input_ids - 3 + 1) % (VOCABULARY - 3) + 3
        prefix = Branch(ids.astype(np.int32), old.trained)
        changed[2] = Example(prefix, tree.branches, tree.origin)
        batch = collate(changed)
        after = token_logps(model, batch)
    theirs = torch.isin(batch.target_sequence, torch.tensor([4, 5]))
    assert torch.equal(before[~theirs], after[~theirs])
    assert not torch.equal(before[theirs], after[theirs])


def _leak_to_the_neighbour(batch: MicroBatch) -> MicroBatch:
    """The second branch also sees the first: a prefix that is one row too long."""
    segments = tuple(
        Segment(s.start, s.stop, s.prefix_start, s.prefix_stop + (s.prefix_stop > s.prefix_start))
        for s in batch.segments
    )
    return _replace(batch, segments=segments)


def _running_positions(batch: MicroBatch) -> MicroBatch:
    """Positions that run on over trees instead of starting anew."""
    return _replace(batch, position_ids=torch.arange(batch.tokens))


def _forgotten_prefix(batch: MicroBatch) -> MicroBatch:
    """Second branches that do not see their prompt."""
    segments = tuple(Segment(s.start, s.stop) for s in batch.segments)
    return _replace(batch, segments=segments)


def _replace(batch: MicroBatch, **changes: Any) -> MicroBatch:
    return replace(batch, **changes)


@pytest.mark.parametrize("fault", [_leak_to_the_neighbour, _running_positions, _forgotten_prefix])
def test_the_comparison_notices_faults(fault: Any) -> None:
    trees = make_trees()
    model = make_model()
    with torch.no_grad():
        wanted = oracle_logps(model, trees)
        attend(model, "segments")
        right = sequence_logps(model, collate(trees))
        wrong = sequence_logps(model, fault(collate(trees)))
    assert (right - wanted).abs().max() < 1e-6
    # Relative positions hide a constant shift within a tree, but not between branches.
    assert (wrong - wanted).abs().max() > 1e-4
