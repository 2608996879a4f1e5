"""A Gaudi card as a device: dense attention, declared shapes, boundaries, and Habana's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from tandem.data.batching.collate import Segment, row_spans
from tandem.errors import UserError
from tandem.integrations.gaudi import bridge
from tandem.integrations.gaudi.static_shapes import declared_shapes
from tandem.model.attention.backend import attention_backend, dense_attention
from tandem.model.attention.layout import LAYOUT_KEYWORD, TreeLayout
from tandem.model.attention.packing_probe import probe_packing
from tandem.model.unwrap import decoder_of
from tandem.recipe.run_settings import HpuSettings
from tandem.runtime.device import BatchRequest, BatchShapes, Device

REASON = "this device compiles a graph for every shape"
# Attention runs under an explicit mask, whose scores grow with the square of the rows.
_MASKED_ROWS = 4096
_HOME = "habana_frameworks.torch.hpex.kernels"


@dataclass(frozen=True)
class GaudiDevice(Device):
    """A Gaudi card, which compiles a graph for every shape it meets.

    `settings` is the recipe's hpu section, `lazy` whether the bridge runs in lazy mode.
    """

    settings: HpuSettings
    lazy: bool

    @property
    def backend(self) -> str:
        """Habana's collectives."""
        return "hccl"

    @property
    def graphs(self) -> str:
        """See `Device.graphs`."""
        return "torch, lazy graphs" if self.lazy else "torch"

    @property
    def free_shapes(self) -> bool:
        """Only declared shapes, see `batch_shapes`."""
        return False

    @property
    def most_rows(self) -> int:
        """See `Device.most_rows`."""
        return _MASKED_ROWS

    def attention(self, requested: str, model: Any) -> tuple[str, str]:
        """See `choose_static`."""
        return choose_static(requested, model, fused=self.settings.fused_attention)

    def optimizer(self, name: str) -> type[torch.optim.Optimizer] | None:
        """Habana's AdamW, if it was asked for."""
        fused = name == "adamw" and self.settings.fused_optimizer
        return bridge.fused_adamw() if fused else None

    def batch_shapes(self, request: BatchRequest) -> tuple[BatchShapes, int]:
        """See `static_shapes.declared_shapes`."""
        return declared_shapes(self.settings.buckets, request)

    def step_boundary(self) -> None:
        """In lazy mode, launch the graph that was gathered."""
        if self.lazy:
            bridge.mark_step()


def open_gaudi(weights: torch.dtype, settings: HpuSettings) -> GaudiDevice:
    """The card that the bridge gives this process; UserError for a kernel that is missing."""
    if settings.fused_optimizer:
        bridge.fused_adamw()
    if settings.fused_attention:
        fused_kernel()
    return GaudiDevice(torch.device("hpu"), weights, settings, bridge.lazy_mode())


def fused_kernel() -> Any:
    """Habana's FusedSDPA, an autograd function. Raises UserError where it cannot be imported."""
    try:
        return import_module(_HOME).FusedSDPA
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"hpu.fused_attention needs FusedSDPA of {_HOME}, which cannot be imported ({error}). "
            "Set it to false."
        ) from None


@attention_backend("fused")
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

    Keys and values are repeated for the query heads that share them, as all known callers do.
    Arguments and result as `backend.dense_attention`.
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


_NAME = "tandem_dense"
_TOKENS = 4
# Operators that make the host wait, or whose output shape depends on values.
_WAITING = {
    "_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim", "_unique2",
}  # fmt: skip


def choose_static(requested: str, model: Any, *, fused: bool) -> tuple[str, str]:
    """Choose dense, or Habana's `fused` kernel, and say why: their shapes depend on no record.

    `model` is on its device, without an adapter. Raises UserError for another requested form, and
    for models whose layers look at values to decide what to compute, as mixtures of experts do.
    """
    if requested not in ("auto", "dense") or (requested == "dense" and fused):
        other = "hpu.fused_attention: false" if fused else "attention: dense (or auto)"
        raise UserError(f"attention: {requested} cannot be used here: {REASON}. Use {other}.")
    name = type(model).__name__
    examined = probe_packing(model)
    if examined.obstacle is not None:
        raise UserError(
            f"{name} cannot read packed trees ({examined.obstacle}), and padded rows have no "
            f"declared shapes, while {REASON}. Use another device."
        )
    if waiting := _waits(model):
        raise UserError(
            f"the layers of {name} decide by their values what to compute ({', '.join(waiting)}), "
            f"while {REASON}. Use another device."
        )
    if fused and examined.softcap:
        raise UserError(
            "hpu.fused_attention: the model soft-caps attention scores, which FusedSDPA cannot. "
            "Set it to false."
        )
    return ("fused", "asked for") if fused else ("dense", REASON)


def _waits(model: Any) -> list[str]:
    """Operators of a forward over a few tokens for which the host waits."""
    segments = (Segment(0, _TOKENS),)
    ids = torch.arange(_TOKENS, device=model.device)
    layout = TreeLayout(segments, ids, row_spans(segments).to(model.device))
    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, dense_attention)
    model.set_attn_implementation(_NAME)
    decoder: Any = decoder_of(model)
    try:
        with torch.no_grad(), _Operators() as seen:
            decoder(
                input_ids=ids[None], position_ids=ids[None], use_cache=False,
                **{LAYOUT_KEYWORD: layout},
            )  # fmt: skip
    finally:
        model.set_attn_implementation(before)
    return sorted(seen.names & _WAITING)


class _Operators(TorchDispatchMode):
    """The names of what is dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))
