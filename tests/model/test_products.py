"""Products with frozen weights give what plain linear layers give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tandem.model import products
from tandem.model.products import product, speed_up_frozen_products


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
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    _, fast = layers(torch.float32, bias=False)
    seen: list[tuple[int, ...]] = []
    original = products.product

    def spy(x: Any, weight: Any, bias: Any = None) -> Any:
        seen.append(tuple(weight.shape))
        return original(x, weight, bias)

    monkeypatch.setattr(products, "product", spy)
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
