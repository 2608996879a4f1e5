"""How exact float32 products are: as exact as float32, on every device."""

from __future__ import annotations

from typing import Any

import torch

from tandem.errors import TandemError

_BACKENDS: Any = torch.backends


def exact_float32() -> None:
    """Turn TF32 and its like off for the process.

    On CUDA, TF32 rounds float32 operands to 10 bits: 1e-3 of a product, where a step in other
    micro-batches may differ by 1e-5. Under bfloat16 nothing that takes time is float32, so
    nothing is lost there. Products are set through torch's older interface, which sets the newer
    one as well, and convolutions through both: where the two disagree, torch raises whenever a
    library reads the older one.

    Raises TandemError if something keeps reduced precision on.
    """
    torch.set_float32_matmul_precision("highest")
    _BACKENDS.cudnn.allow_tf32 = False
    for kind in (_BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn):
        kind.fp32_precision = "ieee"
    if (found := float32_products()) != "ieee":
        raise TandemError(f"float32 products stay in reduced precision: {found}")


def float32_products() -> str:
    """What float32 products and convolutions are computed in: ieee, or what is reduced, and how."""
    found = {
        "cuda.matmul": _BACKENDS.cuda.matmul.fp32_precision,
        "cudnn.conv": _BACKENDS.cudnn.conv.fp32_precision,
        "mkldnn.matmul": _BACKENDS.mkldnn.matmul.fp32_precision,
    }
    reduced = [f"{name} {value}" for name, value in found.items() if value not in ("ieee", "none")]
    return ", ".join(reduced) or "ieee"
