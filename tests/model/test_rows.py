"""The last MLP skips rows nobody reads, and nothing that is read changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tandem.data.batching.collate import collate
from tandem.model.logprobs.sequence_logps import sequence_logps

from ..invariants.made import attend, make_model, make_trees, oracle_logps


def test_only_read_rows_pass_through_the_last_mlp() -> None:
    model = make_model()
    trees = make_trees()
    with torch.no_grad():
        wanted = oracle_logps(model, trees)
    attend(model, "segments")
    seen: list[int] = []

    def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].shape[1])

    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(count)
    batch = collate(trees)
    with torch.no_grad():
        found = sequence_logps(model, batch)
    assert seen == [batch.tokens, len(batch.read_rows)]
    assert len(batch.read_rows) < batch.tokens
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_names_of_weights_stay() -> None:
    plain, wrapped = make_model(), make_model()
    attend(wrapped, "segments")
    assert plain.state_dict().keys() == wrapped.state_dict().keys()
