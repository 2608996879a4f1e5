"""The output head: log-probabilities of given tokens without N x V logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tandem.errors import UserError
from tandem.model.products import product

# Logits of one chunk. On CPU a few hundred rows let the products run at full rate (8 MB, which is
# 65 rows of 32,000 tokens, cost 5 to 8% of a step); on GPUs the chunk has to fill the device.
_CPU_CHUNK_BYTES = 32 * 2**20
_GPU_CHUNK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Head:
    """A frozen output head: logits = softcap(scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: [V, H].
        bias: [V] or None.
        scale: factor on the logits (Cohere, Granite).
        softcap: c of c * tanh(logits / c) (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def head_of(model: nn.Module) -> Head:
    """The frozen head of a transformers causal language model.

    Raises UserError if the head is trained, for instance by an adapter on it.
    """
    config: Any = model.config
    layer: Any = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"the output head of {type(model).__name__} is a {type(layer).__name__}, not a plain "
            "linear layer: leave it out of lora.target_modules"
        )
    if layer.weight.requires_grad and torch.is_grad_enabled():
        raise UserError(
            "the output head is trained; only LoRA on the decoder's layers is supported"
        )
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, scale, None if softcap is None else float(softcap))


def linear_logprob(hidden: Tensor, head: Head, target: Tensor) -> Tensor:
    """log softmax(head(hidden))[target], row by row.

    log p_t depends on h_t alone and the head is frozen, so the forward also computes
    G_t = d log p_t / d h_t and the backward only scales it: 4NVH operations instead of the 6NVH
    of recomputation, and never more than one chunk of logits.

    Args:
        hidden: the hidden states that predict [N, H].
        head: the frozen head.
        target: the tokens predicted [N] int64.

    Returns:
        [N] log-probabilities, float32 (float64 for float64 hidden states).
    """
    logp: Tensor = _LinearLogprob.apply(hidden, head, target)
    return logp


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, target: Tensor) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows, vocabulary = hidden.shape[0], head.weight.shape[0]
        chunk_bytes = _CPU_CHUNK_BYTES if hidden.device.type == "cpu" else _GPU_CHUNK_BYTES
        chunk = max(16, chunk_bytes // (vocabulary * accumulate.itemsize))
        logp = torch.empty(rows, dtype=accumulate, device=hidden.device)
        gradient = torch.empty_like(hidden) if needs_gradient else None
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], head, accumulate)
            log_softmax = torch.log_softmax(logits, dim=-1)
            picked = target[part, None]
            logp[part] = log_softmax.gather(1, picked)[:, 0]
            if gradient is not None:
                _input_gradient(log_softmax, logits, picked, head, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return logp

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0][:, None].to(gradient.dtype), None, None


def _logits(hidden: Tensor, head: Head, accumulate: torch.dtype) -> Tensor:
    if hidden.device.type == "cuda" and hidden.dtype != accumulate:
        # Accumulated and returned in float32: half-precision logits would round log-probs.
        logits = torch.mm(hidden, head.weight.T.to(hidden.dtype), out_dtype=accumulate)
    else:
        logits = product(hidden, head.weight.to(hidden.dtype)).to(accumulate)
    if head.bias is not None:
        logits += head.bias
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _input_gradient(
    log_softmax: Tensor, logits: Tensor, target: Tensor, head: Head, *, out: Tensor
) -> None:
    """(onehot - softmax) through cap and scale, times the weight; overwrites `log_softmax`."""
    slope = log_softmax.exp_().neg_()  # [n, V]
    slope.scatter_add_(1, target, torch.ones_like(target, dtype=slope.dtype))
    if head.softcap is not None:
        slope *= 1.0 - (logits / head.softcap) ** 2
    if head.scale != 1.0:
        slope *= head.scale
    out.copy_(product(slope.to(out.dtype), head.weight.to(out.dtype).T))
