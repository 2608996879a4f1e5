"""Computes what llama.cpp computes with a GGUF file, from the file alone, one layer in memory.

It shares nothing with the code that writes files: weights are taken in the file's own order, heads
are turned as each architecture of llama.cpp turns them, and all sizes come from the file. So a
weight in the wrong order, or a wrong setting, gives other log-probs than the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tandem.errors import UserError
from tandem.export.gguf_file import GgufFile

# Which architectures turn neighbouring numbers of a head; the others turn its two halves.
_INTERLEAVED = {"llama": True, "smollm3": True, "qwen2": False, "qwen3": False, "gemma3": False,
                "phi3": False}  # fmt: skip
_HEAD_ROWS = 1 << 14  # of the output matrix that are in memory at once


@dataclass(frozen=True)
class _Sizes:
    """The settings of a file that its graph reads."""

    layers: int
    heads: int
    key_value_heads: int
    head: int
    epsilon: float
    turned: int  # numbers of a head that positions turn
    base: float
    scale: float  # of positions
    magnitude: float  # of what was turned
    window: int  # gemma3's sliding layers


def file_logps(file: GgufFile, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """The log-probs of every next token of each sequence, [tokens - 1, vocabulary] float32.

    Raises UserError for an architecture that is not computed here, and for a file that lacks a
    tensor or a setting.
    """
    if file.architecture not in _INTERLEAVED:
        raise UserError(
            f"{file.path} is of the architecture {file.architecture!r}; computed are "
            f"{', '.join(_INTERLEAVED)}"
        )
    sizes = _read_sizes(file)
    longest = max(map(len, sequences))
    # What follows a text changes nothing of what comes before it.
    ids = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in sequences])
    with torch.no_grad():
        hidden = _embedded(file, ids)
        if file.architecture == "gemma3":
            hidden = hidden * math.sqrt(hidden.shape[-1])
        for layer in range(sizes.layers):
            hidden = _layer(file, sizes, layer, hidden)
        hidden = _norm(hidden, _tensor(file, "output_norm.weight"), sizes.epsilon)
        head = "output.weight" if "output.weight" in file else "token_embd.weight"
        rows = range(0, file.shape(head)[0], _HEAD_ROWS)
        parts = [hidden @ file.tensor(head, slice(row, row + _HEAD_ROWS)).T for row in rows]
        logps = torch.cat(parts, -1).log_softmax(-1)
    return [logps[row, : len(one) - 1] for row, one in enumerate(sequences)]


def _embedded(file: GgufFile, ids: Tensor) -> Tensor:
    """The embeddings of tokens [S, T] as [S, T, D]; only their rows are read."""
    if "token_embd.weight" not in file:
        raise UserError(f"{file.path} lacks the tensor token_embd.weight")
    if int(ids.max()) >= file.shape("token_embd.weight")[0]:
        raise UserError(f"{file.path} has no embedding of token {int(ids.max())}")
    return file.tensor("token_embd.weight", ids.reshape(-1)).unflatten(0, ids.shape)


def _read_sizes(file: GgufFile) -> _Sizes:
    def of(key: str) -> float:
        value = file.setting(key)
        if value is None:
            raise UserError(f"{file.path} lacks the setting {file.architecture}.{key}")
        return float(value)

    heads = int(of("attention.head_count"))
    head = int(file.setting("attention.key_length") or of("embedding_length") / heads)
    scaling = file.setting("rope.scaling.type", "none")
    factor = float(file.setting("rope.scaling.factor", 1.0))
    if scaling not in ("none", "linear", "longrope"):
        raise UserError(f"{file.path} scales positions by {scaling}, which is not computed here")
    return _Sizes(
        layers=int(of("block_count")),
        heads=heads,
        key_value_heads=int(file.setting("attention.head_count_kv", heads)),
        head=head,
        epsilon=of("attention.layer_norm_rms_epsilon"),
        turned=int(file.setting("rope.dimension_count", head)),
        base=float(file.setting("rope.freq_base", 10000.0)),
        scale=1 / factor if scaling == "linear" else 1.0,
        magnitude=float(file.setting("rope.scaling.attn_factor", 1.0)),
        window=int(file.setting("attention.sliding_window", 0)),
    )


def _tensor(file: GgufFile, name: str) -> Tensor:
    if name not in file:
        raise UserError(f"{file.path} lacks the tensor {name}")
    return file.tensor(name)


def _norm(values: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon) * weight


def _layer(file: GgufFile, sizes: _Sizes, number: int, hidden: Tensor) -> Tensor:
    def weight(name: str) -> Tensor:
        return _tensor(file, f"blk.{number}.{name}.weight")

    def product(values: Tensor, name: str) -> Tensor:
        bias = f"blk.{number}.{name}.bias"
        return F.linear(values, weight(name), file.tensor(bias) if bias in file else None)

    gemma = file.architecture == "gemma3"
    normed = _norm(hidden, weight("attn_norm"), sizes.epsilon)
    if f"blk.{number}.attn_qkv.weight" in file:
        widths = [sizes.heads * sizes.head, *[sizes.key_value_heads * sizes.head] * 2]
        query, key, value = product(normed, "attn_qkv").split(widths, -1)
    else:
        query, key, value = (product(normed, f"attn_{one}") for one in "qkv")
    query, key, value = (
        one.unflatten(-1, (-1, sizes.head)).transpose(1, 2) for one in (query, key, value)
    )  # [S, H, T, C]
    if f"blk.{number}.attn_q_norm.weight" in file:
        query = _norm(query, weight("attn_q_norm"), sizes.epsilon)
        key = _norm(key, weight("attn_k_norm"), sizes.epsilon)
    slides = gemma and (number + 1) % 6 != 0
    if not (file.architecture == "smollm3" and (number + 1) % 4 == 0):
        query, key = (_turned(file, sizes, one, local=slides) for one in (query, key))
    attended = _attention(query, key, value, sizes.window if slides else 0)
    attended = product(attended.transpose(1, 2).flatten(-2), "attn_output")
    if gemma:
        attended = _norm(attended, weight("post_attention_norm"), sizes.epsilon)
    hidden = hidden + attended
    normed = _norm(hidden, weight("ffn_norm"), sizes.epsilon)
    if f"blk.{number}.ffn_gate.weight" in file:
        gate, up = product(normed, "ffn_gate"), product(normed, "ffn_up")
    else:
        gate, up = product(normed, "ffn_up").chunk(2, -1)
    active = F.gelu(gate, approximate="tanh") if gemma else F.silu(gate)
    fed = product(active * up, "ffn_down")
    if gemma:
        fed = _norm(fed, weight("post_ffw_norm"), sizes.epsilon)
    return hidden + fed


def _turned(file: GgufFile, sizes: _Sizes, values: Tensor, *, local: bool) -> Tensor:
    """Heads [S, H, T, C] turned by their positions."""
    base, scale = (10000.0, 1.0) if local else (sizes.base, sizes.scale)
    pairs = torch.arange(0, sizes.turned, 2, dtype=torch.float64)
    speeds = base ** -(pairs / sizes.turned) * scale
    for name in ("rope_freqs.weight", "rope_factors_short.weight"):
        if name in file:
            speeds = speeds / file.tensor(name).double()
    angles = torch.arange(values.shape[2], dtype=torch.float64)[:, None] * speeds
    cosine = (angles.cos() * sizes.magnitude).float()
    sine = (angles.sin() * sizes.magnitude).float()
    part, rest = values[..., : sizes.turned], values[..., sizes.turned :]
    if _INTERLEAVED[file.architecture]:
        first, second = part[..., 0::2], part[..., 1::2]
    else:
        first, second = part.chunk(2, -1)
    one, two = first * cosine - second * sine, first * sine + second * cosine
    if _INTERLEAVED[file.architecture]:
        turned = torch.stack([one, two], -1).flatten(-2)
    else:
        turned = torch.cat([one, two], -1)
    return torch.cat([turned, rest], -1)


def _attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    places = torch.arange(query.shape[2])
    behind = places[:, None] - places
    hidden = (behind < 0) | (behind >= window) if window else behind < 0
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value
