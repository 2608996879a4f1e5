"""What lies inside a causal language model: the plain model in its wrappers, decoder, head."""

from __future__ import annotations

from typing import Any

from torch import nn


def plain_model(model: Any) -> Any:
    """The transformers model, whether adapters were injected or not."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def decoder_of(model: Any) -> Any | None:
    """The module that maps token ids to the hidden states that the head reads, if there is one."""
    plain = plain_model(model)
    decoder = plain.get_decoder()
    if decoder is not plain:
        return decoder
    inner = getattr(plain, "model", None)
    return inner if isinstance(inner, nn.Module) else None


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder's layers, in order; none where their name is neither Llama's nor GPT-2's."""
    decoder = decoder_of(model)
    layers = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    return list(layers) if layers is not None else []


def plain_head(layer: Any) -> Any:
    """A model's output layer without the wrapper that trains some of its rows, or a copy of it."""
    copies = getattr(layer, "_modules", {}).get("modules_to_save")
    if copies is not None:
        return layer.original_module if layer.disable_adapters else copies[layer.active_adapters[0]]
    wrapped = getattr(layer, "token_adapter", None)
    return layer if wrapped is None else wrapped.base_layer
