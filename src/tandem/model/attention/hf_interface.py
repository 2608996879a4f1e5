"""How transformers calls an attention, made of a function that knows segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tandem.errors import UserError
from tandem.model.attention.layout import TreeLayout


def entry(*, soft_caps: bool = False) -> Callable[[Callable[..., Tensor]], Callable[..., Any]]:
    """Turn `attention(query, key, value, layout, scaling, window)` into what transformers calls.

    The function takes and returns what `dense.dense_attention` does.

    Args:
        soft_caps: whether it takes `softcap` as well; the others leave such models to `dense`.

    What is made raises UserError for models whose softmax has learnt sinks: ignoring them would be
    wrong.
    """

    def made_of(attention: Callable[..., Tensor]) -> Callable[..., Any]:
        def called(
            _module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            _attention_mask: Tensor | None,
            *,
            tandem_layout: TreeLayout,
            scaling: float | None = None,
            sliding_window: int | None = None,
            softcap: float | None = None,
            s_aux: Tensor | None = None,
            **_: Any,
        ) -> tuple[Tensor, None]:
            if s_aux is not None:
                raise UserError(
                    "models with attention sinks (such as gpt-oss) cannot be trained yet"
                )
            if softcap is not None and not soft_caps:
                raise ValueError("soft-capped attention takes the dense backend")
            caps = {"softcap": softcap} if soft_caps else {}
            output = attention(
                query, key, value, tandem_layout, scaling=scaling, window=sliding_window, **caps
            )
            return output, None

        return called

    return made_of
