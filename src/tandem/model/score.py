"""Model and micro-batch to the log-probability of each sequence's trained tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tandem.data.collate import MicroBatch
from tandem.model.attention import LAYOUT_KEYWORD, TreeLayout
from tandem.model.head import head_of, linear_logprob


class Scorer(nn.Module):
    """A causal language model seen as a function from micro-batches to sequence log-probs.

    A module of its own, so that whatever wraps modules for several devices wraps this one.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: MicroBatch) -> Tensor:
        """Log-probability of the trained tokens of each sequence [S], summed in float64."""
        return sequence_logps(self.model, batch)


def sequence_logps(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Summed log-probability of each sequence's trained tokens.

    Only hidden states that predict a trained token meet the output head.

    Args:
        model: a transformers causal language model, adapters injected or not, whose attention
            backend is one of tandem's.
        batch: the micro-batch, on the model's device.

    Returns:
        [S] float64: in float32 a long answer's sum is off by 1e-4, and DPO's gradient follows it.
    """
    logps = token_logps(model, batch)
    sums = torch.zeros(batch.sequences, dtype=torch.float64, device=logps.device)
    return sums.index_add(0, batch.target_sequence, logps.double())


def token_logps(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Log-probability of each trained token [N]; see `sequence_logps`."""
    # peft injects its layers into the model in place and wraps it; the plain model is inside.
    unwrap: Any = getattr(model, "get_base_model", None)
    causal: Any = model if unwrap is None else unwrap()
    set_dropout_keys(causal, batch.dropout_keys)
    # Stays until the next micro-batch: activation checkpointing computes the layer once more.
    causal.tandem_rows.rows = batch.read_rows
    layout = TreeLayout(batch.segments, batch.position_ids)
    decoder: Any = causal.get_decoder()
    hidden = decoder(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        **{LAYOUT_KEYWORD: layout},
    ).last_hidden_state[0]  # [T, H]
    return linear_logprob(
        hidden.index_select(0, batch.target_row), head_of(causal), batch.target_id
    )


def set_dropout_keys(model: nn.Module, keys: Tensor | None) -> None:
    """Hand the micro-batch's keys to the model's keyed dropout modules, if it has any."""
    state: Any = getattr(model, "tandem_dropout", None)
    if state is not None:
        state.keys = keys
