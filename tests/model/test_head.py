"""linear_logprob against full logits and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.model.head import Head, linear_logprob


def oracle(hidden: Tensor, head: Head, target: Tensor) -> Tensor:
    logits = hidden @ head.weight.T * head.scale
    if head.bias is not None:
        logits = (hidden @ head.weight.T + head.bias) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_equals_full_logits(bias: bool, scale: float, softcap: float | None) -> None:
    torch.manual_seed(0)
    double = torch.float64
    weight = torch.randn(101, 8, dtype=double)
    head = Head(weight, torch.randn(101, dtype=double) if bias else None, scale, softcap)
    hidden = torch.randn(50, 8, dtype=double, requires_grad=True)
    target = torch.randint(0, 101, (50,))
    weights = torch.randn(50, dtype=double)
    expected = oracle(hidden, head, target)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), hidden)
    found = linear_logprob(hidden, head, target)
    (gradient,) = torch.autograd.grad((found * weights).sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


def test_very_unlikely_tokens_keep_their_log_prob() -> None:
    head = Head(torch.tensor([[200.0], [0.0]]))
    found = linear_logprob(torch.ones(1, 1), head, torch.tensor([1]))
    assert found.item() == pytest.approx(-200.0)


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def test_nothing_of_rows_times_vocabulary_is_ever_allocated() -> None:
    rows, vocabulary = 16384, 10_000
    head = Head(torch.randn(vocabulary, 4))
    hidden = torch.randn(rows, 4, requires_grad=True)
    with _Largest() as largest:
        linear_logprob(hidden, head, torch.zeros(rows, dtype=torch.int64)).sum().backward()
    assert largest.elements <= rows * vocabulary / 16
