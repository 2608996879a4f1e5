"""The C kernels give what torch's operators give in float64, row by row and bit by bit alone."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.data.batching.collate import Segment
from tandem.model.attention.backend import dense_attention
from tandem.model.attention.layout import TreeLayout
from tandem.model.cpu.c_kernels import (
    Kernels,
    RmsNorm,
    SwiGlu,
    TreeAttention,
    TreeAttentionCall,
    kernels,
    low_rank_sum,
    slim_product,
    softmax_block,
    unavailable_reason,
)
from tandem.model.elementwise import fuse_elementwise

from ..warm.python import python

# Prefix and first branch are one segment; other branches, some of one row; trees of one row.
SEGMENTS = (
    Segment(0, 70),
    Segment(70, 71, 0, 33),
    Segment(71, 120, 0, 33),
    Segment(120, 121),
    Segment(121, 190),
    Segment(190, 222, 121, 122),
    Segment(222, 300),
)


@pytest.fixture
def library() -> Kernels:
    found = kernels()
    if found is None:
        pytest.skip(f"no C kernels here: {unavailable_reason()}")
    return found


def positions(segments: tuple[Segment, ...]) -> Tensor:
    return torch.cat(
        [torch.arange(s.stop - s.start) + s.prefix_stop - s.prefix_start for s in segments]
    )


def projections(heads: int, key_heads: int, depth: int) -> list[Tensor]:
    """Query, key, value and a gradient of the output, as views of projections [1, h, T, D]."""
    torch.manual_seed(1)
    rows = SEGMENTS[-1].stop
    return [
        torch.randn(1, rows, h, depth).transpose(1, 2) for h in (heads, key_heads, key_heads, heads)
    ]


def attend(library: Kernels, inputs: list[Tensor], window: int | None = None) -> list[Tensor]:
    """Output [1, T, heads, D] and the gradients of query, key and value."""
    query, key, value = (t.detach().clone().requires_grad_() for t in inputs[:3])
    table = TreeLayout(SEGMENTS, positions(SEGMENTS)).table
    call = TreeAttentionCall(library, *table, 0.3, window)
    output = TreeAttention.apply(call, query, key, value)
    output.backward(inputs[3].transpose(1, 2))
    return [output.detach(), *(t.grad for t in (query, key, value) if t.grad is not None)]


@pytest.mark.parametrize("window", [None, 1, 8, 40])
@pytest.mark.parametrize(("heads", "key_heads", "depth"), [(4, 2, 16), (2, 2, 48), (6, 1, 128)])
def test_attention_equals_a_dense_mask_in_float64(
    library: Kernels, heads: int, key_heads: int, depth: int, window: int | None
) -> None:
    inputs = projections(heads, key_heads, depth)
    found = attend(library, inputs, window)
    query, key, value = (t.double().requires_grad_() for t in inputs[:3])
    layout = TreeLayout(SEGMENTS, positions(SEGMENTS))
    wanted, _ = dense_attention(
        nn.Module(), query, key, value, None,
        tandem_layout=layout, scaling=0.3, sliding_window=window,
    )  # fmt: skip
    wanted.backward(inputs[3].transpose(1, 2).double())
    for ours, theirs in zip(
        found, [wanted.detach(), query.grad, key.grad, value.grad], strict=True
    ):
        assert theirs is not None
        # A window of one position leaves queries and keys without a gradient.
        scale = max(theirs.norm(), wanted.detach().norm())
        assert float((ours - theirs).norm() / scale) < 2e-6


def test_a_changed_tree_moves_no_bit_of_another(library: Kernels) -> None:
    inputs = projections(4, 2, 32)
    before = attend(library, inputs)
    changed = [t.clone() for t in inputs]
    for tensor in changed:
        tensor[:, :, 80:120] += 1  # rows of the first tree
    after = attend(library, changed)
    for ours, theirs in zip(before, after, strict=True):
        rows = (ours, theirs) if ours.shape[1] == SEGMENTS[-1].stop else (
            ours.transpose(1, 2), theirs.transpose(1, 2)
        )  # fmt: skip
        assert torch.equal(rows[0][:, 120:], rows[1][:, 120:])
        assert not torch.equal(rows[0][:, :120], rows[1][:, :120])


def test_the_number_of_threads_moves_no_bit(library: Kernels) -> None:
    inputs = projections(4, 2, 32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(attend(library, inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_not_a_number_stays_so(library: Kernels) -> None:
    inputs = projections(2, 2, 16)
    inputs[0][0, 0, 200, 0] = torch.nan
    output = attend(library, inputs)[0]
    assert output[0, 200, 0].isnan().all()
    assert output[0, :200].isfinite().all()
    gate = torch.tensor([[torch.nan] + [1.0] * 31])
    assert SwiGlu.apply(library, gate, torch.ones(1, 32))[0, 0].isnan()


@pytest.mark.parametrize("shape", [(3, 64), (1, 7, 33)])
def test_swiglu_equals_torch_in_float64(library: Kernels, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    # -100 and 100: where a sigmoid overflows if it is written carelessly.
    gate, up, d_out = (torch.randn(*shape) * 4 for _ in range(3))
    gate.view(-1)[:2] = torch.tensor([-100.0, 100.0])
    ours = [t.clone().requires_grad_() for t in (gate, up)]
    theirs = [t.double().requires_grad_() for t in (gate, up)]
    found, wanted = SwiGlu.apply(library, *ours), F.silu(theirs[0]) * theirs[1]
    found.backward(d_out)
    wanted.backward(d_out.double())
    for a, b in [(found, wanted), (ours[0].grad, theirs[0].grad), (ours[1].grad, theirs[1].grad)]:
        assert b is not None
        torch.testing.assert_close(a, b.float(), rtol=2e-6, atol=2e-6)


def test_rms_norm_equals_torch_in_float64(library: Kernels) -> None:
    torch.manual_seed(0)
    x, weight, d_out = torch.randn(2, 5, 96) * 3, torch.randn(96), torch.randn(2, 5, 96)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    found = RmsNorm.apply(library, ours, weight, 1e-5)
    wanted = F.rms_norm(theirs, (96,), weight.double(), 1e-5)
    found.backward(d_out)
    wanted.backward(d_out.double())
    assert theirs.grad is not None
    torch.testing.assert_close(found, wanted.float(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [1, 6, 64])
def test_a_product_of_a_few_rows_is_the_product_and_the_same_for_every_dtype(
    library: Kernels, dtype: torch.dtype, outputs: int
) -> None:
    columns = 5 * library.lanes
    weight = torch.randn(outputs, columns).to(dtype)
    for shape in ((columns,), (1, columns), (1, 3, columns)):
        x = torch.randn(shape)
        found = slim_product(x, weight)
        assert found is not None
        wanted = (x.double() @ weight.double().T).float()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(found, slim_product(x, weight.float()))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(found, slim_product(x, weight))
    finally:
        torch.set_num_threads(threads)


def test_what_the_kernel_of_a_few_rows_does_not_take(library: Kernels) -> None:
    columns = 2 * library.lanes
    x, weight = torch.randn(1, columns), torch.randn(8, columns)
    assert slim_product(x.double(), weight) is None
    assert slim_product(x, weight.double()) is None
    assert slim_product(x[:, 1:], weight[:, 1:]) is None
    assert slim_product(torch.randn(1, 8), weight.T) is None


def test_a_softmax_in_blocks_is_the_softmax(library: Kernels) -> None:
    torch.manual_seed(0)
    scores = torch.randn(9, 101) * 20
    scores[3, 50:] += 300  # the peak comes late, and what came before is nothing beside it
    peak, total = torch.full((9,), -torch.inf), torch.zeros(9)
    sums = torch.zeros(9)
    for start, stop in ((0, 40), (40, 73), (73, 101)):
        block = scores[:, start:stop].clone()
        shrink = softmax_block(library, block, peak, total)
        sums = sums * shrink + block.sum(dim=1)
    wanted = scores.double().logsumexp(dim=1)
    torch.testing.assert_close(peak + total.log(), wanted.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums, total, rtol=1e-6, atol=0)


class GemmaRMSNorm(nn.Module):
    """Has what Llama's norm has, and means something else by it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32), requires_grad=True)
        self.eps = 1e-6

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, (32,), None, self.eps) * (1.0 + self.weight)


@pytest.mark.parametrize("frozen", [True, False])
def test_only_modules_that_agree_are_fused(library: Kernels, frozen: bool) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.other = GemmaRMSNorm()
    # As it is loaded, or as it is trained.
    model.requires_grad_(not frozen)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits, model.other(torch.ones(1, 32))
        fuse_elementwise(model)
        assert all(one.requires_grad is not frozen for one in model.parameters())
        model.requires_grad_(False)
        after = model(input_ids=ids).logits, model.other(torch.ones(1, 32))
    fused = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    layer = "model.layers.0"
    norms = {f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm", "model.norm"}
    assert fused == {f"{layer}.mlp", *norms}
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


# Where the library is kept does not depend on how well it was compiled.
_ASK = """
from tandem.model.cpu import c_kernels as k
k._FLAGS = ("-O0", *(flag for flag in k._FLAGS if flag != "-O3"))
k._load.cache_clear()  # a fork has the library of the process that it comes from
print(k.kernels(), k.unavailable_reason())
"""


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"CC": "/nonexistent/cc"}, "No such file"),
        ({"CC": "false"}, "failed"),
        ({"TANDEM_KERNELS": "off"}, "TANDEM_KERNELS=off"),
    ],
)
def test_without_a_compiler_there_are_no_kernels_and_a_reason(
    variables: dict[str, str], why: str, tmp_path: Path
) -> None:
    done = _python(_ASK, {**variables, "XDG_CACHE_HOME": str(tmp_path)})
    assert done.stdout.startswith("None ")
    assert why in done.stdout


def test_another_word_for_off_is_an_error(tmp_path: Path) -> None:
    done = _python(_ASK, {"TANDEM_KERNELS": "no", "XDG_CACHE_HOME": str(tmp_path)})
    assert "must be on or off" in done.stderr


def test_the_library_is_built_once(library: Kernels, tmp_path: Path) -> None:
    built = []
    for _ in range(2):
        assert _python(_ASK, {"XDG_CACHE_HOME": str(tmp_path)}).stdout.startswith("Kernels")
        (file,) = (tmp_path / "tandem" / "kernels").iterdir()
        built.append((file.name, file.stat().st_mtime_ns))
    assert built[0] == built[1]


def test_a_damaged_library_is_built_again(library: Kernels, tmp_path: Path) -> None:
    variables = {"XDG_CACHE_HOME": str(tmp_path)}
    folder = tmp_path / "tandem" / "kernels"
    assert _python(_ASK, variables).stdout.startswith("Kernels")
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5000] + b"\x90" + whole[5001:]):
        file.write_bytes(damaged)
        assert _python(_ASK, variables).stdout.startswith("Kernels")
        (file,) = folder.iterdir()
        assert file.read_bytes() != damaged


def test_without_a_cache_a_library_is_built_for_the_process(
    library: Kernels, tmp_path: Path
) -> None:
    (tmp_path / "tandem").write_text("a file in the way")
    assert _python(_ASK, {"XDG_CACHE_HOME": str(tmp_path)}).stdout.startswith("Kernels")


def _python(code: str, variables: dict[str, str]) -> Any:
    return subprocess.run(
        [python(), "-c", f"import os; os.environ.update({variables!r})\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 1), (7, 48, 3), (61, 1024, 16)])
def test_a_low_rank_sum_is_rounded_once(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Within a unit of float32's last place it is the exact sum, rounded to nearest even."""
    outputs, columns, rank = shape
    torch.manual_seed(0)
    weight, a, b = (
        torch.randn(outputs, columns),
        torch.randn(rank, columns),
        torch.randn(outputs, rank),
    )
    weight = weight.to(dtype)
    found = low_rank_sum(weight, a.to(dtype), b, 0.3)
    if found is None and dtype == torch.float16:
        pytest.skip("this processor has no instructions for float16")
    assert found is not None
    merged, squares = found
    assert merged.dtype == dtype
    exact = weight.double() + 0.3 * b.double() @ a.to(dtype).double()
    slack = 1e-6 * exact.abs().clamp(min=1.0)
    low, high = ((exact + sign * slack).to(dtype) for sign in (-1, 1))
    assert ((low <= merged) & (merged <= high)).all()
    torch.testing.assert_close(squares, merged.double().square().sum(1).float())


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38])
def test_a_low_rank_sum_that_is_not_finite_shows_in_its_squares(value: float) -> None:
    weight = torch.zeros(3, 64, dtype=torch.bfloat16)
    weight[1, 40] = value  # the last is rounded to infinity
    found = low_rank_sum(weight, torch.zeros(1, 64), torch.zeros(3, 1), 1.0)
    assert found is not None
    assert torch.equal(found[0], weight) or value != value
    assert torch.isfinite(found[1]).tolist() == [True, False, True]
