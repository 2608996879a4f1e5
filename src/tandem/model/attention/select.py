"""Attention over trees, registered with transformers under tandem's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface

from tandem.errors import UserError
from tandem.integrations.gaudi.attention import choose_static, fused_attention
from tandem.model.attention.dense import dense_attention
from tandem.model.attention.layout import LAYOUT_KEYWORD, TreeLayout
from tandem.model.attention.packing_probe import Examined, declared_obstacle, decoder_of, examine
from tandem.model.attention.segments import segments_attention
from tandem.model.attention.varlen import varlen_attention, why_not_varlen
from tandem.model.logprobs.output_head import skip_unread_rows

__all__ = [
    "LAYOUT_KEYWORD",
    "TreeLayout",
    "choose_backend",
    "declared_obstacle",
    "decoder_of",
    "is_padded",
    "use_backend",
]

_BACKENDS: dict[str, Callable[..., Any]] = {
    "segments": segments_attention,
    "varlen": varlen_attention,
    "dense": dense_attention,
    "fused": fused_attention,
}


def choose_backend(
    requested: str, model: Any, *, static_shapes: bool = False, fused: bool = False
) -> tuple[str, str]:
    """The attention backend for a model where it is, and the reason for it.

    Args:
        requested: auto, segments, varlen, dense or padded.
        model: a loaded transformers causal language model, on its device, without an adapter.
        static_shapes: whether its device may meet declared shapes alone.
        fused: whether Habana's kernel is asked for, in place of dense.

    Returns:
        segments, varlen, dense or fused, which read packed trees, or padded: one row a sequence
        under the model's own attention.

    Raises UserError when the requested backend cannot compute this model.
    """
    if static_shapes:
        return choose_static(requested, model, fused=fused)
    if requested == "padded":
        return requested, "asked for"
    examined = examine(model)
    if examined.obstacle is not None:
        if requested == "auto":
            return "padded", examined.obstacle
        raise UserError(
            f"attention: {requested} reads packed trees, which {type(model).__name__} cannot: "
            f"{examined.obstacle}. Use attention: padded (or auto)."
        )
    obstacles = {
        "varlen": why_not_varlen(examined, model.device, model.dtype),
        "segments": _why_not_segments(examined),
        "dense": None,
    }
    if requested != "auto":
        if obstacle := obstacles[requested]:
            raise UserError(
                f"attention: {requested} cannot compute this model here: {obstacle}. "
                "Use attention: auto."
            )
        return requested, "asked for"
    if obstacles["varlen"] is None:
        return "varlen", "one kernel call a layer"
    if obstacles["segments"] is None:
        on_cuda = model.device.type == "cuda"
        fastest = "the fastest that computes this model"
        return "segments", f"not varlen: {obstacles['varlen']}" if on_cuda else fastest
    return "dense", obstacles["segments"]


def use_backend(model: nn.Module, backend: str) -> None:
    """Let a transformers model attend with `backend`, and skip rows nobody reads.

    padded leaves the model as it is; `score.token_logps` then feeds it rows of one sequence.

    Raises UserError for models that do not go through transformers' attention interface.
    """
    model.tandem_attention = backend  # type: ignore[assignment]
    if backend == "padded":
        return
    if not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"{type(model).__name__} does not use transformers' attention interface, so it cannot "
            "read packed trees. Use attention: padded (or auto)."
        )
    name = f"tandem_{backend}"
    # transformers makes no masks for an attention without an AttentionMaskInterface of its name,
    # which is right: from position ids it would take a pair's second branch for a new document,
    # and it would wait for the device to look at them. The layout says what is visible instead.
    AttentionInterface.register(name, _BACKENDS[backend])
    model.set_attn_implementation(name)  # type: ignore[operator]
    if not hasattr(model, "tandem_rows"):
        model.tandem_rows = skip_unread_rows(model)  # type: ignore[assignment]


def is_padded(model: Any) -> bool:
    """Whether `use_backend` gave this model, adapters injected or not, the padded backend."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return getattr(model if unwrap is None else unwrap(), "tandem_attention", None) == "padded"


def _why_not_segments(examined: Examined) -> str | None:
    if examined.softcap:
        return "the model soft-caps attention scores"
    if any(query != value for query, value in examined.head_sizes):
        return "the model's value heads have another size than its query heads"
    return None
