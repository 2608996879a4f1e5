"""Dense attention by Habana's FusedSDPA, on Gaudi cards where it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import Tensor

from tandem.errors import UserError
from tandem.model.attention.entry import entry
from tandem.model.attention.layout import TreeLayout

_HOME = "habana_frameworks.torch.hpex.kernels"


def fused_kernel() -> Any:
    """Habana's FusedSDPA, an autograd function. Raises UserError where it cannot be imported."""
    try:
        return import_module(_HOME).FusedSDPA
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"hpu.fused_attention needs FusedSDPA of {_HOME}, which cannot be imported ({error}). "
            "Set it to false."
        ) from None


@entry()
def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: TreeLayout,
    *,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """One kernel call over the whole micro-batch under its additive [1, 1, T, T] mask.

    Keys and values are repeated for the query heads that share them: the kernel was seen to be
    called in no other way.

    Arguments and result as `dense.dense_attention`.
    """
    groups = query.shape[1] // key.shape[1]
    output: Tensor = fused_kernel().apply(
        query,
        key.repeat_interleave(groups, dim=1),
        value.repeat_interleave(groups, dim=1),
        layout.bias(window, query.dtype),
        0.0,  # dropout
        False,  # causal: the mask says what is seen
        scaling,
    )
    return output.transpose(1, 2).contiguous()
