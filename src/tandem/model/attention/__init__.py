"""Attention over trees, registered with transformers under tandem's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from tandem.errors import UserError
from tandem.model.attention.dense import dense_attention
from tandem.model.attention.layout import LAYOUT_KEYWORD, TreeLayout
from tandem.model.attention.segments import segments_attention
from tandem.model.rows import skip_unread_rows

__all__ = ["LAYOUT_KEYWORD", "TreeLayout", "choose_backend", "use_backend"]

_BACKENDS: dict[str, Callable[..., Any]] = {
    "segments": segments_attention,
    "dense": dense_attention,
}


def choose_backend(requested: str, config: Any) -> tuple[str, str]:
    """The attention backend for a model and the reason for it.

    Args:
        requested: auto, segments or dense.
        config: the model's transformers configuration.

    Raises UserError when the requested backend cannot compute this model.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    if requested == "segments" and capped:
        raise UserError(
            "attention: segments cannot soft-cap attention scores, which this model does "
            "(attn_logit_softcapping in its config.json); use attention: dense or auto"
        )
    if requested != "auto":
        return requested, "asked for"
    if capped:
        return "dense", "the model soft-caps attention scores"
    return "segments", "the fastest that computes this model"


def use_backend(model: nn.Module, backend: str) -> None:
    """Make a transformers model attend over trees with `backend`, and skip rows nobody reads.

    Raises UserError for models that do not go through transformers' attention interface.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"{type(model).__name__} does not use transformers' attention interface, so it cannot "
            "read packed trees. tandem trains decoder models that do (Llama, Mistral, Qwen, "
            "Gemma, Phi, ...)."
        )
    name = f"tandem_{backend}"
    AttentionInterface.register(name, _BACKENDS[backend])
    AttentionMaskInterface.register(name, _no_mask)
    model.set_attn_implementation(name)  # type: ignore[operator]
    if not hasattr(model, "tandem_rows"):
        model.tandem_rows = skip_unread_rows(model)  # type: ignore[assignment]


def _no_mask(*_: Any, **__: Any) -> None:
    # transformers would derive packed masks from position ids and take a pair's second branch
    # for a new document; the layout says what is visible instead.
    return None
