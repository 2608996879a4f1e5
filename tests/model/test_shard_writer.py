"""Files written tensor by tensor are the bytes that safetensors writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tandem.model.shard_writer import ShardWriter, TensorKind

_KINDS = [
    ("b.weight", (3, 5), torch.bfloat16), ("a.weight", (2, 2), torch.float32),
    ("model.layers.10.w", (7,), torch.float16), ("model.layers.2.w", (1, 1, 3), torch.float16),
    ("scale", (), torch.float64), ("none", (0, 4), torch.float32), ("ids", (3,), torch.int64),
    ("packed", (5,), torch.uint8), ("mask", (2,), torch.bool), ("ä", (1,), torch.int32),
    ("small", (4,), torch.float8_e4m3fn),
]  # fmt: skip


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: (torch.randn(shape) * 9).to(dtype) for name, shape, dtype in _KINDS}


def _kinds(tensors: dict[str, torch.Tensor]) -> dict[str, TensorKind]:
    return {name: TensorKind(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def test_in_any_order_the_bytes_are_safetensors_own(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    writer = ShardWriter(tmp_path / "ours", _kinds(tensors))
    for name in reversed(list(tensors)):
        writer.write(name, tensors[name])
        assert writer.holds(name, tensors[name])
        changed = tensors[name].clone()
        changed.reshape(-1).view(torch.uint8)[-1:] ^= 1
        assert writer.holds(name, changed) is (changed.numel() == 0)
    writer.check_whole()
    writer.close()
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_was_not_announced_or_not_written_is_noticed(tmp_path: Path) -> None:
    tensors = _tensors()
    writer = ShardWriter(tmp_path / "ours", _kinds(tensors))
    for other in (torch.zeros(3, 5), torch.zeros(5, 3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"b\.weight was announced as"):
            writer.write("b.weight", other)
    with pytest.raises(ValueError, match=r"lacks a\.weight"):
        writer.check_whole()
    writer.close()
