"""Which attention a model gets: packed trees by one of the backends, or padded rows by its own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AttentionInterface

from tandem.errors import UserError
from tandem.model.attention.backend import BACKENDS
from tandem.model.attention.packing_probe import PackingProbe, probe_packing
from tandem.model.attention.segments import segments_attention
from tandem.model.attention.varlen import unavailable_reason, varlen_attention
from tandem.model.unwrap import plain_model

__all__ = ["choose_backend", "is_padded", "segments_attention", "use_backend", "varlen_attention"]


def choose_backend(requested: str, model: Any) -> tuple[str, str]:
    """Choose the attention backend of a model, loaded on its device without an adapter.

    Returns the backend and the reason for it: segments, varlen or dense read packed trees; padded
    feeds one row a sequence to the model's own attention. Raises UserError when the requested
    backend cannot compute this model.
    """
    if requested == "padded":
        return requested, "asked for"
    probe = probe_packing(model)
    if probe.obstacle is not None:
        if requested == "auto":
            return "padded", probe.obstacle
        raise UserError(
            f"attention: {requested} reads packed trees, which {type(model).__name__} cannot: "
            f"{probe.obstacle}. Use attention: padded (or auto)."
        )
    obstacles = {
        "varlen": unavailable_reason(probe, model.device, model.dtype),
        "segments": _not_by_segments(probe),
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
    """Let a transformers model attend with a registered backend; padded leaves it as it is.

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
    config: Any = model.config
    if not hasattr(model, "tandem_own_attention"):
        model.tandem_own_attention = config._attn_implementation  # to generate with
    name = f"tandem_{backend}"
    # transformers makes no masks for an attention without an AttentionMaskInterface of its name,
    # which is right: from position ids it would take a pair's second branch for a new document,
    # and it would wait for the device to look at them. The layout says what is visible instead.
    AttentionInterface.register(name, BACKENDS[backend])
    model.set_attn_implementation(name)  # type: ignore[operator]


def is_padded(model: Any) -> bool:
    """Whether `use_backend` gave this model, adapters injected or not, the padded backend."""
    return getattr(plain_model(model), "tandem_attention", None) == "padded"


def _not_by_segments(probe: PackingProbe) -> str | None:
    if probe.softcap:
        return "the model soft-caps attention scores"
    if any(query != value for query, value in probe.head_sizes):
        return "the model's value heads have another size than its query heads"
    return None
