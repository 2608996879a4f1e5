"""The output head: log-probabilities of given tokens without N x V logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tandem.errors import UserError
from tandem.model.added_tokens import TrainedRows, trained_rows
from tandem.model.cpu.c_kernels import kernels, softmax_block
from tandem.model.cpu.onednn_linear import Ordered, Plain, can_order, product
from tandem.model.unwrap import plain_head

# Logits that are held at once: rows of a chunk times columns of a vocabulary block. On CPU they
# stay in the last-level cache; on GPUs a block has to fill the device.
_CPU_BLOCK_BYTES = 16 * 2**20
_GPU_BLOCK_BYTES = 256 * 2**20
_ROWS = 2048
_GPU_ROWS = 16384
_FEWEST_COLUMNS = 512
_ORDERED_COLUMNS = 2048

HeadBlocks = tuple[tuple[int, Ordered], ...]


@dataclass(frozen=True)
class Head:
    """A head: logits = softcap(scale * (hidden @ weight.T + bias)).

    It is frozen, but for `rows`, or as a whole trained, where `weight` requires a gradient.
    """

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0  # factor on the logits (Cohere, Granite)
    softcap: float | None = None  # c of c * tanh(logits / c) (Gemma 2)
    ordered: HeadBlocks | None = None  # the weight once more, in the order that is fastest on CPU
    rows: TrainedRows | None = None  # trained rows, in place of the weight's

    def blocks(self, columns: int, dtype: torch.dtype) -> Iterator[tuple[int, Ordered | Plain]]:
        """The weight's blocks of `columns` tokens in `dtype`, each with its first token."""
        if self.ordered is not None and dtype == self.weight.dtype:
            yield from self.ordered
            return
        for start in range(0, self.weight.shape[0], columns):
            yield start, Plain(self.weight[start : start + columns].to(dtype))


def ordered_blocks(weight: Tensor) -> HeadBlocks:
    """A head's weight in oneDNN's order: blocks of one width, each with its first token."""
    starts = range(0, weight.shape[0], _ORDERED_COLUMNS)
    return tuple((i, Ordered(weight[i : i + _ORDERED_COLUMNS])) for i in starts)


def scores_head(model: nn.Module) -> bool:
    """Whether the output head is a plain linear layer, but for rows of added tokens."""
    return isinstance(plain_head(model.get_output_embeddings()), nn.Linear)  # type: ignore[operator]


def head_of(model: nn.Module) -> Head:
    """The head of a causal language model; UserError for one that is no plain linear layer."""
    config: Any = model.config
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    layer: Any = plain_head(output)
    if not scores_head(model):
        raise UserError(
            f"the output head of {type(model).__name__} is a {type(layer).__name__}, not a plain "
            "linear layer: leave it out of lora.target_modules"
        )
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale *= float(getattr(text, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    caps = (getattr(text, name, None) for name in ("final_logit_softcapping", "logits_soft_cap"))
    softcap = next((float(cap) for cap in caps if cap is not None), None)
    ordered = layer.__dict__.get("tandem_blocks")
    return Head(layer.weight, layer.bias, scale, softcap, ordered, trained_rows(output))


def order_head(model: Any) -> None:
    """Keep a frozen head's weight in oneDNN's order as well; see `onednn_linear.order_weights`."""
    layer = plain_head(model.get_output_embeddings())
    if isinstance(layer, nn.Linear) and can_order(layer):
        layer.tandem_blocks = ordered_blocks(layer.weight)  # type: ignore[assignment]


def linear_logprob(hidden: Tensor, head: Head, target: Tensor) -> Tensor:
    """log softmax(head(hidden))[target], row by row.

    log p_t depends on h_t alone and the head is frozen, so the forward also computes G_t = d log
    p_t / d h_t and the backward only scales it: 4NVH operations instead of the 6NVH of
    recomputation. The vocabulary comes in blocks under a running softmax (arXiv 1805.02867), G_t
    among the running sums: a block's weights serve all rows of a chunk, and the memory for logits
    depends on neither rows nor vocabulary. Trained rows are few: the frozen part leaves them out of
    its sum, and autograd adds them.

    A head that is trained as a whole has a gradient of its own, for which the backward computes the
    logits once more, block by block: 8NVH operations, and no more memory for logits.

    Args:
        hidden: the hidden states that predict [N, H].
        head: the head.
        target: the tokens predicted [N] int64.

    Returns [N] log-probabilities, float32 (float64 for float64 hidden states). On CPU raises
    IndexError for a target beyond the head's rows; elsewhere the check would wait for the device,
    and such a log-probability is NaN.
    """
    if target.device.type == "cpu":  # torch raises IndexError
        head.weight.detach()[:, 0].index_select(0, target)
    if head.rows is not None:
        return _with_trained_rows(hidden, head, head.rows, target)
    if head.weight.requires_grad and torch.is_grad_enabled():
        return _TrainedLinearLogprob.apply(hidden, head.weight, head.bias, head, target)
    return _LinearLogprob.apply(hidden, head, target)


def _with_trained_rows(hidden: Tensor, head: Head, rows: TrainedRows, target: Tensor) -> Tensor:
    """[N]: with f the frozen tokens and n the others, log p_t = z_t - log(sum_f + sum_n).

    log sum_f is z_a - log p_a among the frozen, where a is the target or any frozen token.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    trained = target[:, None] == rows.ids  # [N, n]
    is_trained = trained.any(dim=1)
    frozen = torch.where(is_trained, _frozen_token(rows.ids), target)
    among: Tensor = _LinearLogprob.apply(hidden, head, frozen)
    bias = head.bias
    states = hidden.to(wide)
    own = (states * head.weight[frozen].to(wide)).sum(dim=1)
    own = _shaped(own if bias is None else own + bias[frozen], head)  # [N]
    new = states @ rows.values.to(wide).T
    new = _shaped(new if bias is None else new + bias[rows.ids], head)  # [N, n]
    total = torch.logaddexp(own - among, new.logsumexp(dim=1))
    picked = new.gather(1, trained.int().argmax(dim=1, keepdim=True))[:, 0]
    return torch.where(is_trained, picked, own) - total


def _frozen_token(trained: Tensor) -> Tensor:
    """The first token that is not trained, without waiting for a device: one of n + 1."""
    some = torch.arange(len(trained) + 1, device=trained.device)
    return (some[:, None] != trained).all(dim=1).int().argmax()


def _shaped(logits: Tensor, head: Head) -> Tensor:
    logits = logits * head.scale
    if head.softcap is None:
        return logits
    return head.softcap * torch.tanh(logits / head.softcap)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, target: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        logp, _ = _chunks(hidden, head, target, gradient)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return logp

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0][:, None].to(gradient.dtype), None, None


class _TrainedLinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, target: Tensor
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        head = replace(head, weight=weight.detach(), bias=None if bias is None else bias.detach())
        with torch.no_grad():
            logp, total = _chunks(hidden, head, target, gradient)
        # The weight is saved as autograd wants it, and changes from step to step.
        ctx.head = replace(head, weight=hidden[:0], ordered=None)
        saved = (hidden, weight, target, total)
        ctx.save_for_backward(*saved, *(() if gradient is None else (gradient,)))
        return logp

    @staticmethod
    def backward(
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor | None, None, None]:
        hidden, weight, target, total, *known = ctx.saved_tensors
        head, outer = replace(ctx.head, weight=weight), grad_outputs[0]
        of_hidden = known[0] * outer[:, None].to(known[0].dtype) if known else None
        of_weight = torch.zeros_like(weight, dtype=total.dtype)
        of_bias = None if head.bias is None else torch.zeros_like(head.bias, dtype=total.dtype)
        for part in _row_parts(hidden):
            rows = _Rows(hidden[part], target[part], total[part], outer[part])
            _add_head_gradient(head, rows, of_weight, of_bias)
        of_weight = of_weight.to(weight.dtype)
        if of_bias is not None and head.bias is not None:
            of_bias = of_bias.to(head.bias.dtype)
        return of_hidden, of_weight, of_bias, None, None


@dataclass(frozen=True)
class _Rows:
    """A chunk of n rows, and the loss's gradients in their log-probs."""

    hidden: Tensor  # [n, H]
    target: Tensor  # [n]
    total: Tensor  # log of the sum over the vocabulary of exp(logit) [n]
    outer: Tensor  # [n]


def _add_head_gradient(head: Head, rows: _Rows, weight: Tensor, bias: Tensor | None) -> None:
    """Add what a chunk gives the head's weight [V, H] and bias [V].

    d log p_t / d logit_v is 1 for the target and 0 for others, minus the softmax; times the slope
    of the soft-cap and the factor on the logits.
    """
    accumulate, hidden = rows.total.dtype, rows.hidden
    states = hidden.to(accumulate)
    columns = _block_columns(hidden.shape[0], hidden.device.type, accumulate)
    for start, block in head.blocks(columns, hidden.dtype):
        logits = _logits(hidden, block, start, head, accumulate)
        slope = None if head.softcap is None else 1.0 - (logits / head.softcap) ** 2
        stop = start + logits.shape[1]
        share = logits.sub_(rows.total[:, None]).exp_().neg_()
        inside = (rows.target >= start) & (rows.target < stop)
        at = (rows.target - start).clamp(0, stop - start - 1)[:, None]
        share.scatter_add_(1, at, inside[:, None].to(accumulate))
        if slope is not None:
            share.mul_(slope)
        share.mul_((rows.outer.to(accumulate) * head.scale)[:, None])
        weight[start:stop].addmm_(share.T, states)
        if bias is not None:
            bias[start:stop] += share.sum(dim=0)


def _row_parts(hidden: Tensor) -> Iterator[slice]:
    rows = _ROWS if hidden.device.type == "cpu" else _GPU_ROWS
    for start in range(0, hidden.shape[0], rows):
        yield slice(start, start + rows)


def _chunks(
    hidden: Tensor, head: Head, target: Tensor, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and the logs of the softmax's sums [N]; gradients go to `gradient` [N, H]."""
    accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logp = torch.empty(hidden.shape[0], dtype=accumulate, device=hidden.device)
    total = torch.empty_like(logp)
    for part in _row_parts(hidden):
        out = None if gradient is None else gradient[part]
        logp[part], total[part] = _chunk(hidden[part], head, target[part], accumulate, out)
    return logp, total


def _chunk(
    hidden: Tensor, head: Head, target: Tensor, accumulate: torch.dtype, gradient: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Log-probs and the logs of their sums [n] of a chunk of rows; see `_chunks`."""
    rows = hidden.shape[0]
    peak = hidden.new_full((rows,), -torch.inf, dtype=accumulate)
    total = torch.zeros_like(peak)
    picked = torch.full_like(peak, torch.nan)  # what a target without row keeps
    # sum over the vocabulary of exp(logit - peak) times the logit's slope in h_t
    pulled = None if gradient is None else torch.zeros_like(hidden, dtype=accumulate)
    columns = _block_columns(rows, hidden.device.type, accumulate)
    for start, weight in head.blocks(columns, hidden.dtype):
        logits = _logits(hidden, weight, start, head, accumulate)
        _pick(picked, logits, target - start)
        slope = None
        if pulled is not None and head.softcap is not None:
            slope = 1.0 - (logits / head.softcap) ** 2
        if head.rows is not None:
            _leave_out(logits, head.rows.ids - start)
        shrink = _softmax_block(logits, peak, total)  # logits are exp(logits - peak) from here on
        if pulled is not None:
            weights = logits if slope is None else logits.mul_(slope)
            pulled.mul_(shrink[:, None]).add_(_narrow_product(weights, weight, hidden.dtype))
    if gradient is not None and pulled is not None:
        own = head.weight[target].to(accumulate)
        if head.softcap is not None:
            own *= (1.0 - (picked / head.softcap) ** 2)[:, None]
        gradient.copy_((own - pulled.div_(total[:, None])).mul_(head.scale))
    logs = total.log()
    return picked - peak - logs, peak + logs


def block_bytes(device: str) -> int:
    """Bytes of logits that are held at once on a kind of device."""
    return _CPU_BLOCK_BYTES if device == "cpu" else _GPU_BLOCK_BYTES


def _block_columns(rows: int, device: str, accumulate: torch.dtype) -> int:
    held_bytes = block_bytes(device)
    return max(_FEWEST_COLUMNS, held_bytes // (max(1, rows) * accumulate.itemsize) // 64 * 64)


def _logits(
    hidden: Tensor, weight: Ordered | Plain, start: int, head: Head, accumulate: torch.dtype
) -> Tensor:
    """[n, columns] of the vocabulary's block that begins at `start`."""
    if hidden.device.type == "cuda" and hidden.dtype != accumulate:
        # Accumulated and returned in float32: half-precision logits would round log-probs.
        logits = torch.mm(hidden, weight.backward, out_dtype=accumulate)
    else:
        logits = product(hidden, weight.forward).to(accumulate)
    if head.bias is not None:
        logits += head.bias[start : start + logits.shape[1]]
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _pick(picked: Tensor, logits: Tensor, target: Tensor) -> None:
    """Keep the targets' logits where the block holds them."""
    inside = (target >= 0) & (target < logits.shape[1])
    own = logits.gather(1, target.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    torch.where(inside, own, picked, out=picked)


def _leave_out(logits: Tensor, columns: Tensor) -> None:
    """Give some columns, where the block has them, no share in the softmax."""
    inside = torch.arange(logits.shape[1], device=logits.device)
    out = (inside[:, None] == columns).any(dim=1)
    logits.masked_fill_(out, -1e30)  # finite: a block may have no other columns


def _softmax_block(logits: Tensor, peak: Tensor, total: Tensor) -> Tensor:
    """Take a block into the running softmax, in place; returns what earlier sums shrink by [n]."""
    library = kernels()
    if library is not None and logits.dtype == torch.float32 and logits.device.type == "cpu":
        return softmax_block(library, logits, peak, total)
    raised = torch.maximum(peak, logits.amax(dim=1))
    logits.sub_(raised[:, None]).exp_()
    shrink = (peak - raised).exp()
    total.mul_(shrink).add_(logits.sum(dim=1))
    peak.copy_(raised)
    return shrink


def _narrow_product(weights: Tensor, weight: Ordered | Plain, dtype: torch.dtype) -> Tensor:
    """[n, columns] @ [columns, H], operands in the model's dtype, the result in the wide one."""
    if weights.device.type == "cuda" and dtype != weights.dtype:
        return torch.mm(weights.to(dtype), weight.forward, out_dtype=weights.dtype)
    return product(weights.to(dtype), weight.backward).to(weights.dtype)
