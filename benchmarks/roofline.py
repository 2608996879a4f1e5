"""How much of the machine the needed arithmetic takes: a formula over a measured rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tandem.data.batching.collate import collate
from tandem.data.encoded.example import Example
from tandem.model.cpu.onednn_linear import product

from .work import ADAPTERS, Stage

_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192)}


@dataclass(frozen=True)
class Needed:
    """Floating-point operations that one pass over the records needs, a multiply-add being two.

    With T tokens after prefix sharing, P weights in the decoder's linear layers, L in the
    adapter, N trained tokens, V x H the head, and A visible (query, key) pairs:

    - linear layers: 2PT forward, 2PT backward (frozen weights have no gradient),
    - adapter: 2LT forward, 4LT backward,
    - attention: 4A x heads x head size x layers forward, twice that backward,
    - head: 4NVH with its gradient,
    - DPO's reference once more 2PT, the attention's forward and 2NVH.

    It counts every token in every layer, and an answer's shared first tokens once a pair.

    Attributes:
        loop: training.
        reference: DPO's reference pass; otherwise 0.
        avoidable: how much of both is counted although no target needs it: the last layer's MLP
            on rows that predict nothing, and gradients of the first layer's inputs, which are
            frozen embeddings.
    """

    loop: float
    reference: float
    avoidable: float


def needed_operations(trees: Sequence[Example], config: Any, stage: Stage) -> Needed:
    """What the formula gives for these records."""
    tokens = sum(tree.fed for tree in trees)
    outputs = _outputs(config)
    inputs = _inputs(config)
    layer = sum(inputs[name] * outputs[name] for name in outputs) + 3 * _mlp(config)
    linear = layer * config.num_hidden_layers
    adapter = _adapter(config, stage) * config.num_hidden_layers
    attention = 4 * _visible(trees) * _width(config) * config.num_hidden_layers
    head = 2 * _targets(trees) * config.vocab_size * config.hidden_size
    dpo = stage == "dpo"
    idle_rows = sum(_idle_rows(tree) for tree in trees)
    first_layer = config.hidden_size * (sum(outputs.values()) - outputs["o_proj"])
    first_layer += sum(
        ADAPTERS[stage].rank * config.hidden_size
        for name in ADAPTERS[stage].targets
        if name != "o_proj"
    )
    return Needed(
        loop=float((4 * linear + 6 * adapter) * tokens + 3 * attention + 2 * head),
        reference=float(2 * linear * tokens + attention + head) if dpo else 0.0,
        avoidable=float(
            (6 if dpo else 4) * 3 * _mlp(config) * idle_rows + 2 * first_layer * tokens
        ),
    )


def gemm_rates(device: str = "cpu", repeats: int = 3) -> dict[str, float]:
    """Operations a second of the best square product: float32 on CPU, bfloat16 on CUDA.

    By torch.mm and, on CPU, by the oneDNN product that tandem uses; the machine's rate is the
    better of them.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"torch.mm": torch.mm}
    if device == "cpu":
        ways["oneDNN"] = product
    return {
        name: max(_rate(way, size, device, dtype, repeats) for size in _SIZES[device])
        for name, way in ways.items()
    }


def _rate(
    way: Callable[[Tensor, Tensor], Tensor],
    size: int,
    device: str,
    dtype: torch.dtype,
    repeats: int,
) -> float:
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    # One call of a GPU's product is too short for a clock.
    calls = 20 if device == "cuda" else 1
    best = 0.0
    with torch.no_grad():
        for _ in range(repeats + 1):  # the first is warmer for the next ones
            began = _clock(device)
            for _ in range(calls):
                way(left, right)
            best = max(best, calls * 2 * size**3 / (_clock(device) - began))
    return best


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _inputs(config: Any) -> dict[str, int]:
    """Features that each attention projection reads."""
    hidden = int(config.hidden_size)
    return {"q_proj": hidden, "k_proj": hidden, "v_proj": hidden, "o_proj": _width(config)}


def _outputs(config: Any) -> dict[str, int]:
    """Features that each attention projection gives."""
    width = _width(config)
    key_value = width * config.num_key_value_heads // config.num_attention_heads
    return {"q_proj": width, "k_proj": key_value, "v_proj": key_value, "o_proj": config.hidden_size}


def _mlp(config: Any) -> int:
    """Weights of one of a layer's three MLP projections."""
    return int(config.hidden_size * config.intermediate_size)


def _adapter(config: Any, stage: Stage) -> int:
    inputs, outputs, lora = _inputs(config), _outputs(config), ADAPTERS[stage]
    return sum(lora.rank * (inputs[name] + outputs[name]) for name in lora.targets)


def _width(config: Any) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size * config.num_attention_heads)


def _visible(trees: Sequence[Example]) -> int:
    pairs = 0
    for tree in trees:
        for segment in collate([tree]).segments:
            rows = segment.stop - segment.start
            prefix = segment.prefix_stop - segment.prefix_start
            pairs += rows * prefix + rows * (rows + 1) // 2
    return pairs


def _idle_rows(tree: Example) -> int:
    return tree.fed - len(collate([tree]).read_rows)


def _targets(trees: Sequence[Example]) -> int:
    return sum(int(part.trained.sum()) for tree in trees for part in (tree.prefix, *tree.branches))
