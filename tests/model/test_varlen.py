"""The CUDA backend without a GPU: its gathering, its call and its choice, around a slow kernel."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from tandem.data.batching.collate import Segment, collate
from tandem.errors import UserError
from tandem.model.attention import varlen
from tandem.model.attention.backend import dense_attention
from tandem.model.attention.layout import TreeLayout
from tandem.model.attention.packing_probe import PackingProbe, probe_packing
from tandem.model.attention.select import choose_backend
from tandem.model.attention.varlen import unavailable_reason, varlen_attention
from tandem.model.logprobs.sequence_logps import sequence_logps

from ..invariants.families import TREES
from ..invariants.made import (
    adapt,
    attend,
    gradients,
    largest_relative_error,
    make_tree,
    make_trees,
    oracle_logps,
)
from ..invariants.precision import everything_in_float64

CUDA = torch.device("cuda")
PLAIN = PackingProbe(None, head_sizes=frozenset({(128, 128)}))


def slow_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch documents of varlen_attn, sequence by sequence under an explicit mask.

    (-1, 0) is causal, (W, 0) causal and W keys to the left, both aligned to the lower right as in
    flash attention from 2.1 on.
    """
    assert query.dim() == key.dim() == value.dim() == 3
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q[-1] == len(query)
    assert cu_seq_k[-1] == len(key) == len(value)
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    groups = query.shape[1] // key.shape[1]
    assert enable_gqa == (groups > 1)
    outputs = []
    for i in range(len(cu_seq_q) - 1):
        q = query[cu_seq_q[i] : cu_seq_q[i + 1]].transpose(0, 1)  # [heads, queries, D]
        own = slice(int(cu_seq_k[i]), int(cu_seq_k[i + 1]))
        k = key[own].repeat_interleave(groups, 1).transpose(0, 1)
        v = value[own].repeat_interleave(groups, 1).transpose(0, 1)
        place = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        distance = place - torch.arange(k.shape[1])[None, :]
        left, right = window_size
        visible = (distance >= -right) & ((distance <= left) | (left < 0))
        scores = q @ k.transpose(1, 2) * (scale if scale is not None else q.shape[-1] ** -0.5)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def slow_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow function in the kernel's place."""
    monkeypatch.setattr(varlen, "_varlen_attn", slow_varlen_attn)


def _layout(shapes: Sequence[tuple[int, tuple[int, ...]]]) -> TreeLayout:
    rng = np.random.default_rng(0)
    batch = collate([make_tree(rng, prefix, branches, 0) for prefix, branches in shapes])
    return TreeLayout(batch.segments, batch.position_ids)


@pytest.mark.usefixtures("slow_kernel")
@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "shapes", [[(5, (4, 3)), (3, (2, 6, 5)), (9, (2, 1))], [(0, (7,)), (0, (2,)), (0, (11,))]]
)
def test_equals_dense_attention(
    shapes: list[tuple[int, tuple[int, ...]]], key_heads: int, window: int | None
) -> None:
    layout = _layout(shapes)
    rows = len(layout.position_ids)
    generator = torch.Generator().manual_seed(1)

    def heads(count: int) -> Tensor:
        made = torch.randn(1, rows, count, 8, dtype=torch.float64, generator=generator)
        return made.transpose(1, 2).requires_grad_()

    arguments = heads(4), heads(key_heads), heads(key_heads)
    weights = torch.randn(1, rows, 4, 8, dtype=torch.float64, generator=generator)
    results = []
    for attention in (dense_attention, varlen_attention):
        output, _ = attention(
            nn.Module(), *arguments, None, tandem_layout=layout, scaling=0.3, sliding_window=window
        )
        results.append((output, torch.autograd.grad((output * weights).sum(), arguments)))
    (wanted, wanted_gradients), (found, found_gradients) = results
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    for one, other in zip(found_gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("slow_kernel")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2"])
def test_equals_plain_transformers(family: str) -> None:
    trees = make_trees()
    with everything_in_float64():
        reference = adapt(TREES[family].make())
        wanted = oracle_logps(reference, trees)
        (wanted * torch.arange(len(wanted))).sum().backward()
        plain = TREES[family].make()
        attend(plain, "varlen")
        model = adapt(plain)
        found = sequence_logps(model, collate(trees))
        (found * torch.arange(len(found))).sum().backward()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert largest_relative_error(gradients(model), gradients(reference)) < 1e-9


def test_keys_are_found_once_a_micro_batch_and_gathered_by_path() -> None:
    layout = _layout([(3, (3, 2, 2)), (2, (2, 3))])
    assert layout.segments[1:3] == (Segment(5, 6, 0, 3), Segment(6, 7, 0, 3))
    paths = layout.key_paths
    assert layout.key_paths is paths
    assert paths.rows.tolist() == [
        0, 1, 2, 3, 4,  0, 1, 2, 5,  0, 1, 2, 6,  7, 8, 9,  7, 8, 10, 11,
    ]  # fmt: skip
    assert paths.key_starts.tolist() == [0, 5, 9, 13, 16, 20]
    assert paths.query_starts.tolist() == [0, 5, 6, 7, 10, 12]
    assert (paths.longest_query, paths.longest_path) == (5, 5)
    assert paths.rows[paths.own].tolist() == list(range(12))
    # The first tree's prefix comes twice, in two rounds: adding up has one order.
    assert [rows.tolist() for rows, _ in paths.shared] == [[0, 1, 2, 7, 8], [0, 1, 2]]
    for rows, places in paths.shared:
        assert torch.equal(paths.rows[places], rows)


def test_torchs_own_function_takes_the_call() -> None:
    """Through the installed varlen_attn, its checks, shapes and backward, on tensors without data.

    A keyword that torch renames fails here.
    """
    layout = _layout([(5, (4, 3)), (3, (2, 6, 5))])
    rows = len(layout.position_ids)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _ = layout.key_paths

        def heads(count: int) -> Tensor:
            return torch.randn(1, count, rows, 16, dtype=torch.bfloat16, requires_grad=True)

        query, key, value = heads(4), heads(2), heads(2)
        output, _ = varlen_attention(
            nn.Module(), query, key, value, None, tandem_layout=layout, sliding_window=4
        )
        assert output.shape == (1, rows, 4, 16)
        assert output.dtype == torch.bfloat16
        output.sum().backward()
        assert key.grad is not None
        assert key.grad.shape == key.shape
    ours = set(inspect.signature(slow_varlen_attn).parameters)
    assert ours <= set(inspect.signature(varlen_attn).parameters)


def test_torchs_words_about_windows_are_those_the_slow_kernel_follows() -> None:
    said = " ".join((inspect.getdoc(varlen_attn) or "").split())
    assert "(-1, 0) for causal attention" in said
    assert "(W, 0) for causal attention with sliding window of size W" in said


def _chosen(
    monkeypatch: pytest.MonkeyPatch,
    *,
    probe: PackingProbe = PLAIN,
    device: torch.device = CUDA,
    dtype: torch.dtype = torch.bfloat16,
    capability: tuple[int, int] = (9, 0),
) -> str | None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    return unavailable_reason(probe, device, dtype)


def test_it_is_chosen_on_cuda_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _chosen(monkeypatch) is None
    assert _chosen(monkeypatch, dtype=torch.float16) is None
    refused: list[tuple[dict[str, Any], str]] = [
        ({"dtype": torch.float32}, "bfloat16 and float16, not float32"),
        ({"device": torch.device("cpu")}, "CUDA devices alone"),
        ({"probe": PackingProbe(None, softcap=True)}, "soft-caps"),
        ({"probe": PackingProbe(None, head_sizes=frozenset({(192, 128)}))}, "value heads"),
        ({"probe": PackingProbe(None, head_sizes=frozenset({(20, 20)}))}, "in eights, not 20"),
        ({"probe": PackingProbe(None, head_sizes=frozenset({(512, 512)}))}, "up to 256"),
        ({"capability": (7, 5)}, "8.0 or newer"),
    ]
    for changes, reason in refused:
        assert reason in (_chosen(monkeypatch, **changes) or "")
    large = PackingProbe(None, head_sizes=frozenset({(256, 256)}))
    assert _chosen(monkeypatch, probe=large) is None
    assert "no backward" in (_chosen(monkeypatch, probe=large, capability=(8, 9)) or "")


def test_an_older_torch_takes_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_2_10(query: Any, key: Any, value: Any, is_causal: bool = False) -> None: ...

    monkeypatch.setattr(varlen, "_varlen_attn", of_2_10)
    assert "no varlen_attn with" in (_chosen(monkeypatch) or "")
    monkeypatch.setattr(varlen, "_varlen_attn", None)
    assert "no varlen_attn with" in (_chosen(monkeypatch) or "")


def test_auto_says_what_it_took_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        """A model on the CPU that says it is elsewhere."""

        def __init__(self, model: Any, dtype: torch.dtype) -> None:
            self.device, self.dtype = CUDA, dtype
            self.model = model

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for family, dtype, wanted in (
        ("llama", torch.bfloat16, ("varlen", "one kernel call a layer")),
        ("llama", torch.float32, ("segments", "not varlen: its kernel takes bfloat16")),
        ("gemma2", torch.bfloat16, ("dense", "soft-caps")),
    ):
        model = TREES[family].make(torch.float32)
        probe = probe_packing(model)
        monkeypatch.setattr(
            "tandem.model.attention.select.probe_packing", lambda _, found=probe: found
        )
        backend, why = choose_backend("auto", OnCuda(model, dtype))
        assert backend == wanted[0]
        assert wanted[1] in why


def test_a_cpu_is_told_why_not() -> None:
    with pytest.raises(UserError, match=r"attention: varlen.*CUDA devices alone"):
        choose_backend("varlen", TREES["llama"].make(torch.float32))
