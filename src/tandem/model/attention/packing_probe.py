"""Finds out, with a few tokens, whether a model can read packed trees."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from tandem.model.attention.layout import LAYOUT_KEYWORD
from tandem.model.unwrap import decoder_of

_NAME = "tandem_examination"
_TOKENS = 4
# Arguments of transformers' attention interface that do not change scores,
# or that all of tandem's backends take into account.
_KNOWN = {
    "scaling", "sliding_window", "softcap", "s_aux", "position_ids", "cache_position", "dropout",
    "is_causal", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
    "return_dict", LAYOUT_KEYWORD,
}  # fmt: skip


@dataclass(frozen=True)
class PackingProbe:
    """What a model's attention layers ask for."""

    obstacle: str | None  # why the model cannot read packed trees, None if it can
    softcap: bool = False  # whether any layer soft-caps its scores
    # sizes of query and value heads, a pair for each kind of layer
    head_sizes: frozenset[tuple[int, int]] = frozenset()


def probe_packing(model: Any) -> PackingProbe:
    """Find out whether tokens influence each other only in attention that packed trees can replace.

    Two sequences that differ in their first token go through the model with a stand-in for
    attention under which every row sees itself alone. Where later rows still differ, the model
    carries tokens along by other means (a recurrence, a convolution, attention outside of
    transformers' interface), and a packed micro-batch would leak from one record into the next.
    The stand-in also sees what each layer asks for: masks, windows, soft-caps, sinks. The model,
    loaded and without an adapter, keeps its attention implementation.
    """
    if declared := declared_obstacle(model):
        return PackingProbe(declared)
    decoder: Any = decoder_of(model)
    seen = _Seen()
    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, seen.attend)
    AttentionMaskInterface.register(_NAME, seen.mask)
    model.set_attn_implementation(_NAME)
    ids = torch.arange(_TOKENS, device=model.device).repeat(2, 1)
    ids[1, 0] = _TOKENS
    try:
        with torch.no_grad():
            hidden = decoder(
                input_ids=ids, use_cache=False, **{LAYOUT_KEYWORD: seen}
            ).last_hidden_state  # [2, 4, H]
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        seen.obstacles.append(f"its layers cannot be probed ({type(error).__name__}: {error})")
    else:
        if not _same(hidden[0, 1:], hidden[1, 1:]):
            seen.obstacles.append("it carries tokens along outside of its attention layers")
    finally:
        model.set_attn_implementation(before)
    obstacle = seen.obstacles[0] if seen.obstacles else None
    return PackingProbe(obstacle, seen.softcap, frozenset(seen.head_sizes))


def declared_obstacle(model: Any) -> str | None:
    """What keeps a model from reading packed trees as far as its class says; needs no weights."""
    if getattr(model, "_is_stateful", False):
        return "it keeps state across tokens"
    if not getattr(model, "_supports_attention_backend", False):
        return "it does not use transformers' attention interface"
    decoder = decoder_of(model)
    if decoder is None or "position_ids" not in inspect.signature(decoder.forward).parameters:
        return "it cannot be told the positions of its tokens"
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    # Equal rows of one product may differ by rounding; carried state differs by far more.
    allowed = 32 * torch.finfo(one.dtype).eps * float(one.abs().max())
    return bool(torch.isfinite(one).all()) and float((one - other).abs().max()) <= allowed


@dataclass
class _Seen:
    """What the layers asked for, and what of it trees do not have."""

    obstacles: list[str] = field(default_factory=list)
    masks: list[tuple[Callable[..., Tensor], int | None]] = field(default_factory=list)
    softcap: bool = False
    head_sizes: set[tuple[int, int]] = field(default_factory=set)

    def mask(
        self,
        *_: Any,
        mask_function: Callable[..., Tensor],
        local_size: int | None = None,
        device: torch.device | None = None,
        **__: Any,
    ) -> Tensor:
        """Stand for a mask: return a tensor whose number tells the layer's mask from others."""
        self.masks.append((mask_function, local_size))
        number = float(len(self.masks) - 1)
        return torch.full((2, 1, _TOKENS, _TOKENS), number, device=device)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **asked: Any,
    ) -> tuple[Tensor, None]:
        """Stand for attention: every row gets its own value."""
        window = asked.get("sliding_window")
        if asked.get(LAYOUT_KEYWORD) is not self:
            self.obstacles.append("its layers do not pass keyword arguments on to attention")
        if asked.get("s_aux") is not None:
            self.obstacles.append("its attention has sinks")
        if not getattr(module, "is_causal", True) or asked.get("is_causal") is False:
            self.obstacles.append("its attention sees later tokens")
        if query.shape[2] != key.shape[2]:
            self.obstacles.append("its attention does not see tokens one by one")
        if not self._masked_like_trees(attention_mask, window):
            self.obstacles.append("its attention is masked in a way that trees are not")
        strange = [k for k, v in asked.items() if v is not None and k not in _KNOWN]
        if strange:
            self.obstacles.append(f"its attention asks for {', '.join(sorted(strange))}")
        self.softcap |= asked.get("softcap") is not None
        self.head_sizes.add((query.shape[-1], value.shape[-1]))
        groups = query.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, dim=1).transpose(1, 2).contiguous(), None

    def _masked_like_trees(self, mask: Tensor | None, window: int | None) -> bool:
        """Whether the layer's mask is causal within the window that the layer itself states."""
        if mask is None:
            return window is None
        number = int(mask.flatten()[0])
        if not 0 <= number < len(self.masks) or not bool((mask == number).all()):
            return False
        function, local = self.masks[number]
        edges = {0, 1, *(n * size + d for size in (window, local) if size for n in (1, 2)
                         for d in (-1, 0, 1))}  # fmt: skip
        points = torch.tensor(sorted(edges))
        queries, keys = points[:, None], points[None, :]
        expected = keys <= queries
        if window is not None:
            expected = expected & (queries - keys < window)
        visible = function(torch.tensor(0), torch.tensor(0), queries, keys)
        return torch.equal(torch.broadcast_to(visible, expected.shape), expected)
