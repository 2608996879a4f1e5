"""Grouped-query heads: several query heads read one key head, and no key head is ever copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.data.batching.collate import collate
from tandem.model.attention import backend, layout, segments

from ..invariants.made import make_tree

HEADS, KEY_HEADS, SIZE = 6, 2, 8


class _Watch(TorchDispatchMode):
    """Notes every operator, and every broadcast of a tensor as large as keys for all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.repeats: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func)
        widened = any(
            isinstance(a, Tensor)
            and a.dim() > 3
            and SIZE in a.shape[-2:]
            and any(size > 1 and step == 0 for size, step in zip(a.shape, a.stride(), strict=True))
            for a in args
        )
        if "repeat" in name or widened:
            self.repeats.append(name)
        return func(*args, **(kwargs or {}))


def _inputs() -> tuple[layout.TreeLayout, list[Tensor]]:
    rng = np.random.default_rng(0)
    batch = collate([make_tree(rng, 9, (4, 5), 0), make_tree(rng, 3, (6, 2), 0)])
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(1, batch.tokens, heads, SIZE, dtype=torch.float64, generator=generator)
        .transpose(1, 2)
        .requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    return layout.TreeLayout(batch.segments, batch.position_ids), made


def _repeated(key: Tensor) -> Tensor:
    return key.repeat_interleave(HEADS // KEY_HEADS, dim=1)


@pytest.mark.parametrize(
    ("attend", "options"),
    [
        (backend.dense_attention, {}),
        (backend.dense_attention, {"softcap": 2.0}),
        (backend.dense_attention, {"softcap": 2.0, "sliding_window": 4}),
        (segments.segments_attention, {}),
        (segments.segments_attention, {"sliding_window": 4}),
    ],
)
def test_equals_repeated_heads_without_repeating_them(
    attend: Callable[..., tuple[Tensor, None]], options: dict[str, Any]
) -> None:
    trees, (query, key, value) = _inputs()
    mask = trees.mask(options.get("sliding_window"))
    scores = query @ _repeated(key).transpose(-1, -2) * SIZE**-0.5
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    wanted = (weights @ _repeated(value)).transpose(1, 2)
    with _Watch() as watch:
        found, _ = attend(nn.Module(), query, key, value, None, tandem_layout=trees, **options)
        gradients = torch.autograd.grad(found, (query, key, value), found.detach())
    assert watch.repeats == []
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    expected = torch.autograd.grad(wanted, (query, key, value), wanted.detach())
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_watch_notices_repeats() -> None:
    _, (query, key, _) = _inputs()
    with _Watch() as watch:
        _repeated(key)
        query.unflatten(1, (KEY_HEADS, -1)) @ key.unsqueeze(2).transpose(-1, -2)
    assert len(watch.repeats) >= 2
