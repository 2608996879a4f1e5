"""An adapter into its base, shard by shard, in float32, and checked afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from tandem.artifact.files import atomic_write_json, read_json
from tandem.artifact.hashing import weight_files, weight_index
from tandem.errors import UserError
from tandem.model.adapter_folder import NewRows, Update
from tandem.model.quantization import Quantized

# Names that a head has which is no more than the input embedding once more.
HEADS = ("lm_head.weight", "embed_out.weight")


def merge_shards(
    base: Path,
    updates: dict[str, Update],
    output: Path,
    *,
    dtype: torch.dtype | None,
    quantized: Quantized | None = None,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Write the base's shards with the updates added; at most one shard is in memory.

    Args:
        base: model folder with safetensors weights.
        updates: from `read_updates`.
        output: an existing folder; gets the shards under the base's names, and their index.
        dtype: of the floating-point weights written; None keeps each weight's own.
        quantized: which of the weights the adapter saw in 4 bits. Those, changed by an update or
            not, are written as it saw them.
        device: where they are rounded.

    Returns:
        The names of the files written.

    Raises UserError if an update finds no weight, shapes disagree, or a sum is not finite.
    """
    remaining = dict(updates)
    tied = _tied_rows(base, updates)
    unseen = set(quantized.weights) if quantized else set()
    index: dict[str, str] = {}
    total_bytes = 0
    written = []
    for shard in weight_files(base):
        tensors: dict[str, Tensor] = {}
        for name, weight in _tensors(shard):
            seen = quantized.rounded(name, weight, torch.device(device)) if quantized else weight
            unseen.discard(name)
            kept = dtype or weight.dtype
            update = remaining.pop(name, None)
            if update is None and name in HEADS:
                update = tied
            merged = _add(name, seen, update, kept)
            tensors[name] = merged
            index[name] = shard.name
            total_bytes += merged.numel() * merged.element_size()
        save_file(tensors, output / shard.name, metadata={"format": "pt"})
        written.append(shard.name)
    if missing := sorted(remaining.keys() | unseen):
        raise UserError(
            f"{base} has no weight named {missing[0]} (and {len(missing) - 1} more "
            "that the adapter changes): is this the model it was trained on?"
        )
    if (listed := weight_index(base)) is not None:
        atomic_write_json(
            output / listed.name, {"metadata": {"total_size": total_bytes}, "weight_map": index}
        )
        written.append(listed.name)
    return written


def added(updates: dict[str, Update]) -> list[int]:
    """The added tokens whose embeddings an adapter brings."""
    rows = [update for update in updates.values() if isinstance(update, NewRows)]
    return sorted({index for one in rows for index in one.ids})


def vocabulary_grown(output: Path, updates: dict[str, Update]) -> None:
    """Let a merged folder's configuration count the rows of its added tokens."""
    ids = added(updates)
    if not ids:
        return
    config = read_json(output / "config.json")
    text = config if "vocab_size" in config else config["text_config"]
    text["vocab_size"] = max(text["vocab_size"], max(ids) + 1)
    atomic_write_json(output / "config.json", config)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}. Copy or download it again.") from None


def _tensors(shard: Path) -> Iterator[tuple[str, Tensor]]:
    with _opened(shard) as file:
        for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            yield name, file.get_tensor(name)


def _tied_rows(base: Path, updates: dict[str, Update]) -> NewRows | None:
    """The rows of the one embedding that input and output share, or None if they are two."""
    rows = [update for update in updates.values() if isinstance(update, NewRows)]
    config = AutoConfig.from_pretrained(base) if len(rows) == 1 else None
    tied = config is not None and config.get_text_config().tie_word_embeddings
    return rows[0] if tied else None


def _replace(name: str, weight: Tensor, rows: NewRows, dtype: torch.dtype) -> Tensor:
    """A matrix with some rows replaced, longer by what it lacks."""
    first, last = min(rows.ids), max(rows.ids)
    behind = [index for index in rows.ids if index >= weight.shape[0]]
    gap = bool(behind) and min(behind) > weight.shape[0]
    if gap or weight.shape[1] != rows.values.shape[1]:
        raise UserError(
            f"{name} has shape {tuple(weight.shape)} in the base, and the adapter has rows "
            f"{first} to {last} of width {rows.values.shape[1]}: is this the model it was trained "
            "on?"
        )
    grown = weight.new_zeros((max(weight.shape[0], last + 1), weight.shape[1]), dtype=dtype)
    grown[: weight.shape[0]] = weight.to(dtype)
    grown[list(rows.ids)] = rows.values.float().to(dtype)
    if not torch.isfinite(grown[list(rows.ids)]).all():
        raise UserError(f"{name} is not finite after merging into {dtype}")
    return grown


def _add(name: str, weight: Tensor, update: Update | None, dtype: torch.dtype) -> Tensor:
    target = dtype if weight.is_floating_point() else weight.dtype
    if update is None:
        return weight.to(target).contiguous()
    if not weight.is_floating_point():
        raise UserError(f"{name} is stored as {weight.dtype}; merge into unquantised weights")
    if isinstance(update, NewRows):
        return _replace(name, weight, update, target)
    shape = (update.b.shape[0], update.a.shape[1])
    if update.transposed:
        shape = shape[::-1]
    if shape != weight.shape:
        raise UserError(
            f"{name} has shape {tuple(weight.shape)} in the base and {shape} in the adapter: is "
            "this the model it was trained on?"
        )
    merged = update.added_to(weight).to(target)
    if not torch.isfinite(merged).all():
        raise UserError(f"{name} is not finite after merging into {target}")
    return merged.contiguous()
