"""Weights that stay as narrow as they are stored, and are widened to float32 where they are used.

Widening is exact, and the products are those of float32 weights, so every result has the same bits.
Linear layers and embeddings, which are nearly all of a model, are kept so; the rest is float32.
That is done in families that read these weights in no other way than by calling them: `KEPT`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NARROW = (torch.bfloat16, torch.float16)
# Transformers' model types in which it changes no bit, as a test finds for each of them. Others may
# ask a weight for its dtype, or multiply with it themselves.
KEPT = frozenset(
    (
        "bamba", "bloom", "cohere", "cohere2", "deepseek_v3", "gemma2", "gemma3_text", "glm4",
        "gpt2", "gpt_neox", "gpt_oss", "granite", "llama", "llama4_text", "minimax", "mistral",
        "mixtral", "nemotron", "olmo2", "opt", "phi3", "phimoe", "qwen2", "qwen3", "qwen3_moe",
        "rwkv", "smollm3", "stablelm",
    )
)  # fmt: skip
_scratch = threading.local()


def kept(module: nn.Module) -> bool:
    """Whether a module's weight may stay narrow; subclasses may do more with it."""
    return type(module) in (nn.Linear, nn.Embedding)


def keep_stored(model: Any) -> None:
    """Prepare a model whose matrices are narrower than its activations, which are float32."""
    for module in filter(kept, model.modules()):
        module.weight.requires_grad_(False)  # a gradient would be as narrow
        if type(module) is nn.Embedding:
            module.forward = partial(_looked_up, module)  # type: ignore[method-assign]
    model.tandem_stored = True


def is_stored(model: Any) -> bool:
    """Whether weights of a model are narrower than its activations."""
    return hasattr(model, "tandem_stored")


def widen(*layers: Any) -> None:
    """Make the weights of layers float32, for whatever changes them or reads them itself."""
    for layer in layers:
        layer.weight.data = layer.weight.data.float()


def widened(weight: Tensor) -> Tensor:
    """A matrix in float32, with the same order of strides, in memory that the next call overwrites.

    A fresh piece of memory for each of a model's matrices would take as long as a product.
    """
    turned = weight.stride(0) < weight.stride(1)
    rows = weight.T if turned else weight
    held: Tensor | None = getattr(_scratch, "held", None)
    if held is None or held.numel() < weight.numel():
        held = _scratch.held = torch.empty(weight.numel(), dtype=torch.float32)
    wide = held[: weight.numel()].view(rows.shape).copy_(rows)
    return wide.T if turned else wide


@contextmanager
def as_float32(model: Any) -> Iterator[None]:
    """Inside, stored weights look like float32 ones without memory.

    peft makes an adapter's weights in the dtype of the layer's.
    """
    narrow = [p for p in model.parameters() if is_stored(model) and p.dtype in NARROW]
    held = [weight.data for weight in narrow]
    for weight in narrow:
        weight.data = torch.zeros((), dtype=torch.float32).expand(weight.shape)
    try:
        yield
    finally:
        for weight, data in zip(narrow, held, strict=True):
            weight.data = data


def _looked_up(layer: nn.Embedding, ids: Tensor) -> Tensor:
    return F.embedding(ids, layer.weight).float()
