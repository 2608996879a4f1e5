"""Merges an adapter into its base, shard by shard, in float32, and checks the result."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from tandem.errors import UserError
from tandem.model.added_tokens import make_missing_rows
from tandem.model.load_model import load_adapter, load_base, load_model
from tandem.model.lora.adapter import added_ids_of_folder
from tandem.model.lora.adapter_folder import ExpertsUpdate, LowRankUpdate, NewRows, Update
from tandem.model.quantize import Quantized, read_record
from tandem.model.weight_files import HEADS, Part, opened, parts_of, read_headers
from tandem.storage.atomic_files import atomic_write_json, read_json
from tandem.storage.hashing import weight_files, weight_index


def merge_shards(
    base: Path,
    updates: dict[str, Update],
    output: Path,
    *,
    model: Any,
    dtype: torch.dtype | None,
    quantized: Quantized | None = None,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Write the base's shards with the updates added; at most one shard is in memory.

    Files, and names in them, are the base's own, also where the model has others in memory.

    Args:
        base: model folder with safetensors weights.
        updates: from `read_updates`, by the weights' names in memory or in the files.
        output: an existing folder; gets the shards, and their index.
        model: the base, its weights on the meta device.
        dtype: of the floating-point weights written; None keeps each weight's own.
        quantized: the weights that the adapter saw in 4 bits, all written as it saw them.
        device: where they are rounded.

    Returns the names of the files written. Raises UserError if an update finds no weight, shapes
    disagree, or a sum is not finite.
    """
    sums = _Sums(base, updates, model, dtype, quantized, torch.device(device))
    index: dict[str, str] = {}
    total_bytes = 0
    written = []
    for shard in weight_files(base):
        tensors: dict[str, Tensor] = {}
        with opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                tensors[name] = sums.of(name, file.get_tensor(name))
                index[name] = shard.name
                total_bytes += tensors[name].nbytes
        save_file(tensors, output / shard.name, metadata={"format": "pt"})
        written.append(shard.name)
    sums.check_all_found()
    if (listed := weight_index(base)) is not None:
        atomic_write_json(
            output / listed.name, {"metadata": {"total_size": total_bytes}, "weight_map": index}
        )
        written.append(listed.name)
    return written


class _Sums:
    """The sums of a base's tensors and an adapter's updates, asked for in the files' order.

    Tensors that form one changed weight, such as an expert's, are summed together; those whose turn
    has not come wait.
    """

    def __init__(
        self,
        base: Path,
        updates: dict[str, Update],
        model: Any,
        dtype: torch.dtype | None,
        quantized: Quantized | None,
        device: torch.device,
    ) -> None:
        self._base, self._updates, self._model = base, updates, model
        self._dtype, self._quantized, self._device = dtype, quantized, device
        self._tied = _tied_rows(base, updates)
        self._headers = read_headers(base)
        self._parts = {name: part for part in parts_of(self._headers, model) for name in part.names}
        self._waiting: dict[str, Tensor] = {}
        self._changed = updates.keys() | set(quantized.weights if quantized else ())
        self._summed: set[str] = set()

    def of(self, name: str, weight: Tensor) -> Tensor:
        """A tensor of the files, by its name there, as it is written."""
        if name in self._waiting:
            return self._waiting.pop(name)
        part = self._parts[name]
        if name in self._updates or not part.weights:
            return self._sum(name, weight)
        if part.converter is None:
            return self._sum(part.weights[0], weight)
        if not self._changed & set(part.weights):
            return _add(name, weight, None, self._dtype or weight.dtype)
        self._waiting |= self._together(part)
        return self._waiting.pop(name)

    def check_all_found(self) -> None:
        """Raise UserError unless the files had every weight that was to be changed."""
        if missing := sorted(self._changed - self._summed):
            raise UserError(
                f"{self._base} has no weight named {missing[0]} (and {len(missing) - 1} more "
                "that the adapter changes): is this the model it was trained on?"
            )

    def _sum(self, name: str, weight: Tensor, expert: int | None = None) -> Tensor:
        """A weight and its update, by its name in memory; or those of one `expert` alone."""
        self._summed.add(name)
        kept = self._dtype or weight.dtype
        seen = self._quantized.rounded(name, weight, self._device) if self._quantized else weight
        update = self._updates.get(name)
        if update is None and name in HEADS:
            update = self._tied
        if not isinstance(update, ExpertsUpdate):
            return _add(name, seen, update, kept)
        if weight.dim() != 3 or (expert is None and len(weight) != update.experts):
            raise UserError(
                f"{name} has shape {tuple(weight.shape)} in the base, and the adapter has "
                f"{update.experts} experts: is this the model it was trained on?"
            )
        numbers = range(update.experts) if expert is None else [expert]
        return torch.stack(
            [_add(name, seen[i], update.of(number), kept) for i, number in enumerate(numbers)]
        )

    def _together(self, part: Part) -> dict[str, Tensor]:
        """A part's tensors as they are written, by their names in the files."""
        tensors = {name: _tensor(self._headers[name].file, name) for name in part.names}
        weights = part.assembled(tensors, self._model)
        back = part.cut(weights, self._model)
        if any(not torch.equal(back[name], tensor) for name, tensor in tensors.items()):
            raise UserError(f"{part.names[0]} of {self._base} cannot be taken out of its weight")
        sums = {name: self._sum(name, weight, part.expert) for name, weight in weights.items()}
        merged = part.cut(sums, self._model)
        return {
            name: merged[name].to(self._dtype or tensor.dtype).contiguous()
            for name, tensor in tensors.items()
        }


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


def _tensor(shard: Path, name: str) -> Tensor:
    with opened(shard) as file:
        return file.get_tensor(name)


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
    gap = min(behind, default=0) > weight.shape[0]
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


def _add(
    name: str, weight: Tensor, update: LowRankUpdate | NewRows | None, dtype: torch.dtype
) -> Tensor:
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


# Mean absolute difference of a token's log-prob that the stored dtype explains.
_ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_MAX_TOKENS = 256


@dataclass(frozen=True)
class Verified:
    """Mean absolute differences of token log-probs on the probe texts, in nats."""

    difference: float  # between the merged model and base + adapter
    effect: float  # between base + adapter and the base alone
    tokens: int

    @property
    def lossy(self) -> bool:
        """Whether rounding took a noticeable part of what the adapter had learnt."""
        return self.difference > max(0.2 * self.effect, 1e-4)


def verify_merge(
    base: Path,
    adapter: Path,
    merged: Path,
    probes: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Verified:
    """Compare token log-probs of the merged model with base + adapter; one is loaded at a time.

    The base is quantised here where it was in training; a CPU computes in float32. `probes` are
    token ids, `dtype` the merged weights' own. Raises UserError when log-probs differ by more than
    `dtype` explains.
    """
    compute = torch.float32 if device.type == "cpu" and dtype != torch.float64 else dtype
    record = read_record(adapter)
    # The adapter saw a base rounded from bfloat16 in bfloat16 again.
    formats = {dtype, record.torch_dtype} if record else {dtype}
    plain = load_base(base, adapter, dtype=compute, device=device)
    make_missing_rows(plain, added_ids_of_folder(adapter))
    before = _token_logps(plain, probes)
    together = _token_logps(load_adapter(plain, adapter), probes)
    del plain
    gc.collect()
    after = _token_logps(load_model(merged, dtype=compute, device=device), probes)
    difference = float((after - together).abs().mean())
    effect = float((together - before).abs().mean())
    # A merge into a narrow dtype may not cost most of what was learnt, either.
    allowed = max(min(max(_ALLOWED[d] for d in formats), 0.8 * effect), 1e-4)
    if not difference <= allowed:
        raise UserError(
            f"the merged model does not compute what base and adapter do: token log-probs differ "
            f"by {difference:.4g} nats on average over {after.numel()} probe tokens (allowed "
            f"{allowed:.2g}; the adapter itself changes them by {effect:.4g}). The merge was "
            "discarded. If the dtype is narrow, merge with --dtype float32; otherwise the "
            "adapter belongs to another base or a file is damaged."
        )
    return Verified(difference, effect, after.numel())


def _token_logps(model: Any, probes: Sequence[Sequence[int]]) -> Tensor:
    parts = []
    with torch.no_grad():
        for probe in probes:
            ids = torch.tensor([list(probe[:_MAX_TOKENS])], device=model.device)
            logps = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            parts.append(logps[:-1].gather(1, ids[0, 1:, None])[:, 0].cpu().double())
    return torch.cat(parts)
