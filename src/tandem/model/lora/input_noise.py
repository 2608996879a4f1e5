"""NEFTune: noise on the input embeddings while training, drawn by the rows' keys."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tandem.model.lora.forward import DropoutKeys
from tandem.model.unwrap import plain_model

# Tells the noise from the masks of dropout modules, which count from 0.
_NUMBER = 2**31 - 1


def add_noise(model: Any, alpha: float) -> None:
    """Let a model's input embeddings carry noise in training mode (arXiv 2310.05914, algorithm 1).

    Each number is uniform in [-1, 1), times alpha / sqrt(L x d): d channels, L the tokens that the
    row's record feeds. It follows from (seed, step, record, token, channel), as the masks of
    `KeyedDropout` do, so that packing, processes and a resume do not change it.
    """
    plain = plain_model(model)
    shared: DropoutKeys = getattr(plain, "tandem_dropout", None) or DropoutKeys()
    plain.tandem_dropout = shared

    def noisy(module: Any, _: Any, hidden: Tensor) -> Tensor:
        if not module.training:
            return hidden
        keys, lengths = shared.keys, shared.lengths
        if keys is None or lengths is None:
            raise ValueError("noise is on but the micro-batch carries no keys")
        noise = uniform(keys.flatten(), channel_constants(hidden.shape[-1], hidden.device))
        scale = alpha / (lengths.flatten() * hidden.shape[-1]).to(noise.dtype).sqrt()
        return hidden + (noise * scale[:, None]).view(hidden.shape).to(hidden.dtype)

    plain.get_input_embeddings().register_forward_hook(noisy)


def channel_constants(channels: int, device: torch.device) -> Tensor:
    """An odd int32 constant for each channel [C]."""
    generator = torch.Generator().manual_seed(_NUMBER)
    constants = torch.randint(-(2**31), 2**31, (channels,), generator=generator)
    return (constants | 1).to(torch.int32).to(device)


def uniform(keys: Tensor, channels: Tensor) -> Tensor:
    """[T, C] float32, uniform in [-1, 1), of keys [T] int64 and odd channel constants [C] int32.

    A multiply-shift hash as in `keep_mask`, and murmur3's finaliser behind it: a value has more
    than the one bit of a mask, and products of one row alone would lie on lines.
    """
    rows = (keys ^ (keys >> 32)).to(torch.int32)
    mixed = rows[:, None] * channels[None, :]
    for shift, factor in ((16, -0x7A143595), (13, -0x3D4D51CB), (16, None)):
        # A signed shift repeats the sign, where murmur3 has zeros.
        mixed = mixed ^ ((mixed >> shift) & (2 ** (32 - shift) - 1))
        mixed = mixed if factor is None else mixed * factor
    return mixed.to(torch.float32).mul_(math.ldexp(1.0, -31)).clamp_(max=1 - 2**-24)
