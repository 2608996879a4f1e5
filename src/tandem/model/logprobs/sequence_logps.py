"""Log-probs of a micro-batch's sequences, from packed trees or from padded rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tandem.data.batching.collate import MicroBatch, Segment, padded_shape
from tandem.data.batching.packing import pack, pack_padded
from tandem.data.encoded.example import Example
from tandem.errors import UserError
from tandem.model.attention.layout import LAYOUT_KEYWORD, TreeLayout
from tandem.model.attention.select import is_padded
from tandem.model.logprobs.output_head import head_of, linear_logprob
from tandem.model.lora.forward import set_dropout_keys
from tandem.model.unwrap import decoder_of, plain_model


@dataclass(frozen=True)
class PaddedRows:
    """A micro-batch's sequences side by side.

    tokens     P0 P1 P2 | C0 C1 | R0        rows     P0 P1 P2 C0 C1
                                                     P0 P1 P2 R0  .
    """

    rows: Tensor  # [S, L] int64; which row of the micro-batch each place shows; padding shows row 0
    # [N] int64; the place that predicts each target
    target_sequence: Tensor
    target_position: Tensor
    tokens: int  # places that are no padding


def padded_rows(batch: MicroBatch) -> PaddedRows:
    """Undo sharing and packing: each sequence from its root to the row of its last target.

    Padding stands on the right, after everything that is read, so a causal model needs no mask
    for it, whatever it carries along from token to token.
    """
    # The row that predicts each sequence's last target, -1 for a sequence without any.
    none = torch.full((batch.sequences,), -1, device=batch.target_row.device)
    last: list[int] = none.scatter_reduce(
        0, batch.target_sequence, batch.target_row, "amax"
    ).tolist()
    ends = [row for row in last if row >= 0]  # a sequence without targets needs no place
    paths = [_path(batch.segments, row) for row in ends]
    lengths = [len(path) for path in paths]
    rows = torch.zeros(len(paths), max(lengths), dtype=torch.int64)
    for place, path in enumerate(paths):
        rows[place, : len(path)] = path
    number = torch.tensor([row >= 0 for row in last]).cumsum(0) - 1
    device = batch.input_ids.device
    return PaddedRows(
        rows=rows.to(device),
        target_sequence=number.to(device)[batch.target_sequence],
        target_position=batch.position_ids[batch.target_row],
        tokens=sum(lengths),
    )


def _path(segments: tuple[Segment, ...], row: int) -> Tensor:
    """The rows from a tree's root to `row`, in the order of their positions."""
    starts = [segment.start for segment in segments]
    parts: list[Tensor] = []
    while True:
        segment = segments[bisect_right(starts, row) - 1]
        parts.append(torch.arange(segment.start, row + 1))
        if segment.prefix_stop == segment.prefix_start:
            return torch.cat(parts[::-1])
        row = segment.prefix_stop - 1


class Scorer(nn.Module):
    """A causal language model as a function from micro-batches to sequence log-probs.

    A module, so that what wraps modules for several devices wraps this one. `precision` makes the
    context of mixed precision in here, because some wrappers switch off the one around them.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        sums: torch.dtype = torch.float64,
        of_token: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.precision, self.sums = model, precision, sums
        self.of_token = of_token  # acts while the model trains, not where it is scored

    def forward(self, batch: MicroBatch | Callable[[], Any]) -> Any:
        """Log-probability of the trained tokens of each sequence [S], in `sums`.

        Or what a function returns, which runs the model in another way.
        """
        with self.precision():
            if not isinstance(batch, MicroBatch):
                return batch()
            of_token = self.of_token if self.model.training else None
            return sequence_logps(self.model, batch, self.sums, of_token)


def micro_batches(model: Any, trees: Sequence[Example], budget: int) -> list[tuple[int, ...]]:
    """Which trees share a forward of this model under a token budget, as positions in `trees`."""
    if is_padded(model):
        return pack_padded([padded_shape(tree) for tree in trees], budget)
    return pack([tree.fed for tree in trees], budget)


def tokens_fed(model: Any, tree: Example) -> int:
    """Tokens of a tree that go through the model: shared ones once, padding not counted."""
    if not is_padded(model):
        return tree.fed
    return sum(len(tree.prefix.input_ids) + branch.fed for branch in tree.branches)


def check_head(model: Any) -> None:
    """Raise UserError unless `head_of` describes how the model makes logits of hidden states.

    A few tokens are scored both ways: a factor or a soft-cap that tandem does not know of would
    otherwise train towards other log-probs than the model's own. Attention is the model's own here.
    """
    ids = torch.arange(4, device=model.device)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
        exact = logits.cpu().double()  # not every device has float64
        decoder = decoder_of(model)
        if decoder is None:
            raise UserError(f"{type(model).__name__} has no decoder that tandem can find")
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
        tokens = exact.argsort(dim=-1)[:, [0, -1]].T.flatten()  # the least and the most likely
        ours = linear_logprob(hidden.repeat(2, 1), head_of(model), tokens.to(model.device)).cpu()
        wanted = exact.log_softmax(-1).repeat(2, 1).gather(1, tokens[:, None])[:, 0]
    rounding = 2 * torch.finfo(model.dtype).eps * float(logits.abs().max())
    off = float((ours - wanted).abs().max())
    if not off <= rounding + 2e-4:
        raise UserError(
            f"{type(model).__name__} does more to its logits than tandem knows of (log-probs "
            f"differ by {off:.3g}), so it cannot be trained or scored"
        )


def sequence_logps(
    model: nn.Module,
    batch: MicroBatch,
    sums: torch.dtype = torch.float64,
    of_token: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Summed log-probability of each sequence's trained tokens [S], in `sums`.

    Only hidden states that predict a trained token meet the output head.

    Args:
        model: a transformers causal language model, adapters injected or not, that
            `prepare_model.FOR_SCORING` has prepared.
        batch: the micro-batch, on the model's device.
        sums: float64, or float32 for devices without it. Added up plainly in float32 a long
            answer's sum is off by 1e-4, and DPO's gradient follows it; here it is rounded once.
        of_token: what each token's log-prob is replaced by before it is added up.
    """
    logps = token_logps(model, batch)
    if of_token is not None:
        logps = of_token(logps)
    if batch.target_weight is not None:
        logps = logps * batch.target_weight
    # One more slot than sequences, for filler targets of a declared shape.
    empty = torch.zeros(batch.sequences + 1, dtype=sums, device=logps.device)
    add = partial(empty.index_add, 0, batch.target_sequence)
    if sums == torch.float64:
        total = add(logps.double())
    else:
        # Multiples of 2^-10 add up exactly up to 2^14 nats; what remains of each is too small
        # for its sum's rounding to matter.
        coarse = (logps.detach() * 2**10).round() / 2**10
        total = add(coarse) + add(logps - coarse)
    # No view: engines that shard weights hook what a module returns.
    return total[: batch.sequences].clone()


def token_logps(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Log-probability of each trained token [N]; see `sequence_logps`."""
    causal: Any = plain_model(model)
    hidden = _padded(causal, batch) if is_padded(causal) else _packed(causal, batch)
    return linear_logprob(hidden, head_of(causal), batch.target_id)


def _packed(causal: Any, batch: MicroBatch) -> Tensor:
    """The hidden states that predict, from one row of trees [N, H]."""
    set_dropout_keys(causal, batch.dropout_keys, batch.record_tokens)
    # Stays until the next micro-batch: activation checkpointing computes the layer once more.
    causal.tandem_rows.rows = batch.read_rows
    layout = TreeLayout(batch.segments, batch.position_ids, batch.spans)
    decoder: Any = decoder_of(causal)
    hidden = decoder(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        **{LAYOUT_KEYWORD: layout},
    ).last_hidden_state[0]  # [T, H]
    return hidden.index_select(0, batch.target_row)


def _padded(causal: Any, batch: MicroBatch) -> Tensor:
    """The hidden states that predict, in the order of the targets, from a row a sequence [N, H]."""
    padded = padded_rows(batch)
    drawn_by = (batch.dropout_keys, batch.record_tokens)
    set_dropout_keys(causal, *(None if one is None else one[padded.rows] for one in drawn_by))
    decoder: Any = decoder_of(causal)
    hidden = decoder(input_ids=batch.input_ids[padded.rows], use_cache=False).last_hidden_state
    return hidden[padded.target_sequence, padded.target_position]
