"""linear_logprob against full logits and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.model.added_tokens import TrainedRows
from tandem.model.logprobs import output_head as head_module
from tandem.model.logprobs.output_head import Head, linear_logprob, ordered_blocks


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


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_of_the_vocabulary_add_up(
    ordered: bool, softcap: float | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "_CPU_BLOCK_BYTES", 1)
    monkeypatch.setattr(head_module, "_FEWEST_COLUMNS", 100)
    monkeypatch.setattr(head_module, "_ORDERED_COLUMNS", 100)
    monkeypatch.setattr(head_module, "_ROWS", 40)
    if not compiled:
        monkeypatch.setenv("TANDEM_KERNELS", "off")
    torch.manual_seed(0)
    weight, bias = torch.randn(950, 32), torch.randn(950)
    weight[700] *= 20  # where a late block's peak leaves nothing of the earlier ones
    blocks = ordered_blocks(weight) if ordered else None
    head = Head(weight, bias, 0.7, softcap, blocks)
    hidden = torch.randn(90, 32, requires_grad=True)
    target = torch.randint(0, 950, (90,))
    wide = Head(weight.double(), bias.double(), 0.7, softcap)
    double = hidden.detach().double().requires_grad_()
    expected = oracle(double, wide, target)
    found = linear_logprob(hidden, head, target)
    found.sum().backward()
    expected.sum().backward()
    assert hidden.grad is not None
    assert double.grad is not None
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert float((hidden.grad - double.grad).norm() / double.grad.norm()) < 2e-6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_trained_head_gets_the_gradients_of_full_logits(
    bias: bool, softcap: float | None, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks:
        monkeypatch.setattr(head_module, "_CPU_BLOCK_BYTES", 1)
        monkeypatch.setattr(head_module, "_FEWEST_COLUMNS", 30)
        monkeypatch.setattr(head_module, "_ROWS", 20)
    torch.manual_seed(0)
    double = torch.float64
    leaves = [torch.randn(50, 8, dtype=double), torch.randn(101, 8, dtype=double)]
    leaves += [torch.randn(101, dtype=double)] if bias else []
    hidden, weight, *biases = (leaf.requires_grad_() for leaf in leaves)
    head = Head(weight, *biases, scale=0.7, softcap=softcap)
    target, weights = torch.randint(0, 101, (50,)), torch.randn(50, dtype=double)
    found = linear_logprob(hidden, head, target)
    expected = oracle(hidden, head, target)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    both = [torch.autograd.grad((logps * weights).sum(), leaves) for logps in (found, expected)]
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(linear_logprob(hidden, head, target), expected)


def test_a_trained_head_needs_no_gradient_of_what_it_reads() -> None:
    weight = torch.randn(11, 4, requires_grad=True)
    linear_logprob(torch.randn(3, 4), Head(weight), torch.arange(3)).sum().backward()
    assert weight.grad is not None
    assert float(weight.grad.norm()) > 0


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
        trained = Head(head.weight.clone().requires_grad_())
        linear_logprob(hidden, trained, torch.zeros(rows, dtype=torch.int64)).sum().backward()
    assert largest.elements <= rows * vocabulary / 16


def test_a_larger_vocabulary_takes_no_more_memory() -> None:
    found = []
    for vocabulary in (20_000, 80_000):
        head = Head(torch.randn(vocabulary, 4))
        hidden = torch.randn(2048, 4, requires_grad=True)
        with _Largest() as largest:
            linear_logprob(hidden, head, torch.arange(2048)).sum().backward()
        found.append(largest.elements)
    assert found[0] == found[1] < 2048 * 20_000 / 8


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("ids", [[99, 100], [0, 1, 57]])
def test_trained_rows_are_scored_and_get_gradients(
    scale: float, softcap: float | None, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "_CPU_BLOCK_BYTES", 1)
    monkeypatch.setattr(head_module, "_FEWEST_COLUMNS", 99)  # the last block has trained rows only
    torch.manual_seed(0)
    double = torch.float64
    place = torch.tensor(ids)
    weight = torch.randn(101, 8, dtype=double)
    values = torch.randn(len(ids), 8, dtype=double, requires_grad=True)
    hidden = torch.randn(60, 8, dtype=double, requires_grad=True)
    target = torch.cat([place, torch.randint(0, 101, (60 - len(ids),))])
    weights = torch.randn(60, dtype=double)
    whole = Head(weight.index_copy(0, place, values), None, scale, softcap)
    expected = oracle(hidden, whole, target)
    wanted = torch.autograd.grad((expected * weights).sum(), (hidden, values))
    head = Head(weight, None, scale, softcap, rows=TrainedRows(place, values))
    found = linear_logprob(hidden, head, target)
    gradients = torch.autograd.grad((found * weights).sum(), (hidden, values))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("wanted", [101, -1])
@pytest.mark.parametrize("rows", [None, TrainedRows(torch.tensor([3]), torch.randn(1, 8))])
def test_a_target_beyond_the_rows_is_never_a_score(wanted: int, rows: TrainedRows | None) -> None:
    """On CPU an error; where nobody looks, a log-prob that is not a number."""
    torch.manual_seed(0)
    head, hidden = Head(torch.randn(101, 8), rows=rows), torch.randn(4, 8)
    target = torch.tensor([5, 100, wanted, 0])
    with torch.no_grad(), pytest.raises(IndexError, match="index out of range"):
        linear_logprob(hidden, head, target)
    unseen, _ = head_module._chunk(hidden, Head(head.weight), target, torch.float32, None)
    assert unseen.isnan().tolist() == [False, False, True, False]
