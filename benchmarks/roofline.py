"""How much of the machine the needed arithmetic takes: a formula over a measured rate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from tandem.data.collate import collate, fed_tokens
from tandem.data.records import Tree

from .work import RANK, TARGETS, Stage


def needed_operations(trees: Sequence[Tree], config: Any, stage: Stage) -> float:
    """Floating-point operations that one pass over the records needs, a multiply-add being two.

    With T tokens after prefix sharing, P weights in the decoder's linear layers, L in the
    adapter, N trained tokens, V x H the head, and A visible (query, key) pairs:

    - linear layers: 2PT forward, 2PT backward (frozen weights have no gradient),
    - adapter: 2LT forward, 4LT backward,
    - attention: 4A x heads x head size x layers forward, twice that backward,
    - head: 4NVH with its gradient,
    - DPO's reference once more 2PT, the attention's forward and 2NVH.

    It counts every token in every layer, and an answer's shared first tokens once a pair.
    """
    tokens = sum(fed_tokens(tree) for tree in trees)
    linear, adapter = _weights(config)
    attention = 4 * _visible(trees) * _width(config) * config.num_hidden_layers
    head = 2 * _targets(trees) * config.vocab_size * config.hidden_size
    training = (4 * linear + 6 * adapter) * tokens + 3 * attention + 2 * head
    reference = 2 * linear * tokens + attention + head
    return float(training + (reference if stage == "dpo" else 0))


def gemm_rate(sizes: Sequence[int] = (1024, 2048, 4096), repeats: int = 3) -> float:
    """Operations a second of the best float32 square product."""
    best = 0.0
    for size in sizes:
        left, right = torch.randn(size, size), torch.randn(size, size)
        out = left @ right
        for _ in range(repeats):
            began = time.perf_counter()
            torch.mm(left, right, out=out)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def _weights(config: Any) -> tuple[int, int]:
    hidden, inner, width = config.hidden_size, config.intermediate_size, _width(config)
    key_value = width * config.num_key_value_heads // config.num_attention_heads
    outputs = {"q_proj": width, "k_proj": key_value, "v_proj": key_value}
    layer = hidden * sum(outputs.values()) + width * hidden + 3 * hidden * inner
    adapter = sum(RANK * (hidden + outputs[name]) for name in TARGETS)
    return layer * config.num_hidden_layers, adapter * config.num_hidden_layers


def _width(config: Any) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size * config.num_attention_heads)


def _visible(trees: Sequence[Tree]) -> int:
    pairs = 0
    for tree in trees:
        for segment in collate([tree]).segments:
            rows = segment.stop - segment.start
            prefix = segment.prefix_stop - segment.prefix_start
            pairs += rows * prefix + rows * (rows + 1) // 2
    return pairs


def _targets(trees: Sequence[Tree]) -> int:
    return sum(int(part.trained.sum()) for tree in trees for part in (tree.prefix, *tree.branches))
