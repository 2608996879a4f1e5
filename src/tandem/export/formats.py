"""Number formats of a GGUF file, and what each of them makes of a weight.

The rounding here is written in torch and belongs to no other library, so that a file can be
compared with it. gguf's own functions write and read the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.export.choices import FileFormat

FORMATS: tuple[FileFormat, ...] = get_args(FileFormat)
BLOCK = 32
"""Numbers of a row that share one scale in q8_0."""

_F16_MOST = 65504.0
_NUMBERS = 1 << 24  # of a matrix that are float32 at once: 64 MiB
# Bytes that so many numbers take: for q8_0 a scale of 2 bytes and a byte for each.
_SIZES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (BLOCK, BLOCK + 2)}
# What rounding may leave of a tensor: the root mean square of the error against that of the tensor.
# Formats of few bits depend on who has rounded; a tensor in another order is off by about 1.4.
_FEW_BITS = {"8": 0.02, "6": 0.04, "5": 0.08, "4": 0.16, "3": 0.3, "2": 0.5, "1": 0.7}


def tensor_format(shape: tuple[int, ...], wanted: FileFormat) -> str:
    """The format of a tensor in a file of a format, by gguf's name.

    Vectors stay in float32, as llama.cpp computes with them so. Rows that q8_0 cannot cut into
    blocks are f16.
    """
    if len(shape) < 2:
        return "F32"
    if wanted == "q8_0" and shape[-1] % BLOCK:
        return "F16"
    return wanted.upper()


def rows_at_once(shape: Sequence[int]) -> int:
    """How many rows of a matrix are widened at once, so that little memory is taken."""
    return max(1, _NUMBERS // max(1, math.prod(shape[1:])))


def nbytes(shape: tuple[int, ...], name: str) -> int:
    """Bytes of a tensor in a format of those that are written."""
    numbers, size = _SIZES[name]
    return torch.Size(shape).numel() // numbers * size


UNPACKED = frozenset(_SIZES)
"""Formats that `unpacked` reads; gguf's functions read the others."""


def unpacked(stored: Tensor, name: str) -> Tensor:
    """The float32 numbers of a tensor [..., N], from its bytes in a file, or its narrow numbers."""
    if name == "BF16":
        return stored.view(torch.bfloat16).float()
    if name != "Q8_0":
        return stored.float()
    blocks = stored.reshape(-1, BLOCK + 2)
    scale = blocks[:, :2].contiguous().view(torch.float16).float()
    steps = blocks[:, 2:].view(torch.int8).float()
    return (steps * scale).reshape(*stored.shape[:-1], -1)


def rounded(values: Tensor, name: str) -> Tensor | None:
    """A tensor after it was rounded to a format, float32; None for formats not written here."""
    wide = values.float()
    if name == "F32":
        return wide
    if name in ("F16", "BF16"):
        return wide.to(torch.float16 if name == "F16" else torch.bfloat16).float()
    if name != "Q8_0":
        return None
    blocks = wide.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    steps = blocks * inverse
    # Halves are rounded away from zero.
    whole = steps.sign() * (steps.abs() + 0.5).floor()
    return (whole * scale.half().float()).reshape(wide.shape)


def error_bound(values: Tensor, name: str) -> Tensor | None:
    """What rounding to a format may change each number by, [as values]; None for other formats.

    A number that was rounded twice, by way of another format, is within twice that.
    """
    wide = values.float().abs()
    if name == "F32":
        return wide * 2.0**-24
    if name == "F16":  # 11 bits, and steps of 2^-24 below the smallest normal number
        return wide * 2.0**-11 + 2.0**-25
    if name == "BF16":
        return wide * 2.0**-8 + 2.0**-133
    if name != "Q8_0":
        return None
    blocks = wide.reshape(-1, BLOCK)
    most = blocks.amax(1, keepdim=True)
    # Half a step, and the scale's own rounding to 11 bits, which counts 127 times.
    bound = (most / 127 * 0.5 + most * 2.0**-11 + 127 * 2.0**-25) * 1.001
    return bound.expand_as(blocks).reshape(wide.shape)


def share_bound(name: str) -> float:
    """The relative error of a whole tensor that a format of few bits explains."""
    bits = next((letter for letter in name if letter.isdigit()), "")
    return _FEW_BITS.get(bits, _FEW_BITS["1"])


def check_range(values: Tensor, gguf_name: str, name: str) -> None:
    """Raise UserError for numbers that a format cannot hold."""
    if name == "F16" and float(values.abs().max()) > _F16_MOST:
        raise UserError(
            f"{gguf_name} has the number {float(values.abs().max()):.4g}, and f16 ends at "
            f"{_F16_MOST:.0f}. Export with --type bf16 or f32."
        )
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"{gguf_name} has numbers that are not finite. Train or merge again.")
