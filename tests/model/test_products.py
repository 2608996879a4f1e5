"""Products with frozen weights give what plain linear layers give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tandem.model.cpu import onednn_linear
from tandem.model.cpu.onednn_linear import (
    Ordered,
    Plain,
    bytes_to_order,
    low_rank_product,
    order_weights,
    product,
    speed_up_frozen_products,
    weights_of,
)


def layers(dtype: torch.dtype, *, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)
    fast = nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)
    fast.load_state_dict(plain.state_dict())
    speed_up_frozen_products(nn.Sequential(fast))
    return plain, fast


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_and_gradients_equal_the_plain_layer(dtype: torch.dtype, bias: bool) -> None:
    plain, fast = layers(dtype, bias=bias)
    ours = torch.randn(1, 33, 24, dtype=dtype, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    weights = torch.randn(1, 33, 40, dtype=dtype)
    found, wanted = fast(ours), plain(theirs)
    # Summed, so that the gradient arrives expanded as well as dense.
    ((found * weights).sum() + found.sum()).backward()
    ((wanted * weights).sum() + wanted.sum()).backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours.grad, theirs.grad)
    with torch.no_grad():
        torch.testing.assert_close(fast(ours), wanted)


def test_a_layer_that_is_trained_gets_its_gradient() -> None:
    plain, fast = layers(torch.float32, bias=True)
    x = torch.randn(5, 24)
    for layer in (plain, fast):
        layer.requires_grad_()
        layer(x).pow(2).sum().backward()
    assert plain.weight.grad is not None
    torch.testing.assert_close(fast.weight.grad, plain.weight.grad)
    torch.testing.assert_close(fast.bias.grad, plain.bias.grad)


def test_frozen_float32_products_on_cpu_take_the_fast_way(monkeypatch: pytest.MonkeyPatch) -> None:
    _require_onednn()
    _, fast = layers(torch.float32, bias=False)
    seen: list[tuple[int, ...]] = []
    original = onednn_linear.product

    def spy(x: Any, weight: Any, bias: Any = None) -> Any:
        seen.append(tuple(weight.shape))
        return original(x, weight, bias)

    monkeypatch.setattr(onednn_linear, "product", spy)
    fast(torch.randn(5, 24, requires_grad=True)).sum().backward()
    assert seen == [(40, 24), (24, 40)]


def test_one_row_does_not_move_another_by_a_bit() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(70, 48), torch.randn(96, 48)
    changed = x.clone()
    changed[3] += 1
    before, after = product(x, weight), product(changed, weight)
    others = torch.arange(70) != 3
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[3], after[3])


def test_weights_in_another_order_give_the_same() -> None:
    _require_onednn()
    plain, fast = layers(torch.float32, bias=True)
    order_weights(fast)
    assert bytes_to_order(fast) == 2 * fast.weight.nbytes
    assert isinstance(weights_of(fast), Ordered)
    for rows in (1, 33, 700):
        ours = torch.randn(rows, 24, requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        found, wanted = fast(ours), plain(theirs)
        found.pow(2).sum().backward()
        wanted.pow(2).sum().backward()
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_only_frozen_float32_weights_are_put_in_order() -> None:
    for layer in (nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.float64).requires_grad_(False)):
        order_weights(layer)
        assert isinstance(weights_of(layer), Plain)
    assert bytes_to_order(nn.Linear(4, 4, dtype=torch.bfloat16)) == 0


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_the_low_rank_product_equals_pefts(dropped: bool, ordered: bool) -> None:
    _require_onednn()
    plain, fast = layers(torch.float32, bias=True)
    if ordered:
        order_weights(fast)
    torch.manual_seed(1)
    results = []
    tensors = [torch.randn(1, 19, 24), torch.randn(4, 24), torch.randn(40, 4)]
    mask = (torch.rand(1, 19, 24) > 0.3) / 0.7
    for layer, product_of in ((plain, _as_peft), (fast, low_rank_product)):
        x, down, up = (t.clone().requires_grad_() for t in tensors)
        out = product_of(x, x * mask if dropped else x, layer, down, up, 0.5)
        out.pow(2).sum().backward()
        results.append([out.detach(), x.grad, down.grad, up.grad])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def _as_peft(x: Any, dropped: Any, layer: nn.Linear, down: Any, up: Any, scale: float) -> Any:
    return layer(x) + dropped @ down.T @ up.T * scale


def _require_onednn() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
