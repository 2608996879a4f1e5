"""The sums of a base's weights and an adapter's updates, computed in float32 and rounded once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from tandem.errors import UserError
from tandem.model.cpu.c_kernels import low_rank_sum
from tandem.model.cpu.onednn_linear import product
from tandem.model.lora.adapter_folder import (
    ExpertsUpdate,
    LowRankUpdate,
    NewRows,
    Update,
    WholeWeight,
)
from tandem.model.quantize import Quantized
from tandem.model.shard_writer import TensorKind
from tandem.model.weight_files import HEADS, Header, Part

# Numbers of a weight that are summed at once, few enough for a processor's cache.
_BLOCK = 1 << 18


class Sums:
    """The sums of a base's tensors and an adapter's updates."""

    def __init__(
        self,
        base: Path,
        updates: Mapping[str, Update],
        model: Any,
        dtype: torch.dtype | None,
        quantized: Quantized | None,
        device: torch.device,
    ) -> None:
        """See `merge_weights.MergedShards` for the arguments."""
        self._base, self._updates, self._model = base, updates, model
        self._dtype, self._quantized, self._device = dtype, quantized, device
        self._tied = _tied_rows(base, updates)
        self._changed = updates.keys() | set(quantized.weights if quantized else ())

    def check_all_found(self, names: Collection[str]) -> None:
        """Raise UserError unless the files have every weight that is to be changed."""
        if missing := sorted(self._changed.difference(names)):
            raise UserError(
                f"{self._base} has no weight named {missing[0]} (and {len(missing) - 1} more "
                "that the adapter changes): is this the model it was trained on?"
            )

    def kind(self, part: Part, header: Header, dtype: torch.dtype) -> TensorKind:
        """The shape and dtype that a tensor of a part, of a dtype, is written with."""
        kept = self._dtype if self._dtype is not None and dtype.is_floating_point else dtype
        named = self._updates.keys() & set(part.names) or not part.weights
        update = self._update(part.names[0] if named else part.weights[0])
        if isinstance(update, NewRows):
            rows = max(header.shape[0], *(index + 1 for index in update.ids))
            return TensorKind((rows, *header.shape[1:]), kept)
        return TensorKind(header.shape, kept)

    def of(self, part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a part, by their names in the files, as they are written."""
        if self._updates.keys() & set(part.names) or not part.weights:
            return {name: self._sum(name, tensor) for name, tensor in tensors.items()}
        if part.converter is None:
            return {part.names[0]: self._sum(part.weights[0], tensors[part.names[0]])}
        if not self._changed & set(part.weights):
            return {
                name: _add(name, tensor, None, self._kept(tensor))
                for name, tensor in tensors.items()
            }
        return self._together(part, tensors)

    def seen(self, part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that a part makes, by their names in memory, as the adapter saw them."""
        return {
            name: self._rounded(name, weight)
            for name, weight in part.assembled(tensors, self._model).items()
        }

    def _update(self, name: str) -> Update | None:
        """What is added to a weight, by its name in memory or in the files."""
        update = self._updates.get(name)
        return self._tied if update is None and name in HEADS else update

    def _kept(self, tensor: Tensor) -> torch.dtype:
        return self._dtype or tensor.dtype

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        return self._quantized.rounded(name, weight, self._device) if self._quantized else weight

    def _sum(self, name: str, weight: Tensor, expert: int | None = None) -> Tensor:
        """A weight and its update, by its name in memory; or those of one `expert` alone."""
        kept, seen, update = self._kept(weight), self._rounded(name, weight), self._update(name)
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

    def _together(self, part: Part, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of a part whose tensors are put together, taken apart again."""
        weights = part.assembled(tensors, self._model)
        back = part.cut(weights, self._model)
        if any(not torch.equal(back[name], tensor) for name, tensor in tensors.items()):
            raise UserError(f"{part.names[0]} of {self._base} cannot be taken out of its weight")
        sums = {name: self._sum(name, weight, part.expert) for name, weight in weights.items()}
        merged = part.cut(sums, self._model)
        return {
            name: merged[name].to(self._kept(tensor)).contiguous()
            for name, tensor in tensors.items()
        }


def _tied_rows(base: Path, updates: Mapping[str, Update]) -> NewRows | None:
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


def _instead(name: str, weight: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    """The adapter's own weight."""
    if values.shape != weight.shape:
        raise UserError(
            f"{name} has shape {tuple(weight.shape)} in the base and {tuple(values.shape)} in the "
            "adapter, which trained it as a whole: is this the model it was trained on?"
        )
    if not torch.isfinite(rounded := values.to(dtype)).all():
        raise UserError(f"{name} is not finite after merging into {dtype}")
    return rounded.contiguous()


def _add(
    name: str,
    weight: Tensor,
    update: LowRankUpdate | NewRows | WholeWeight | None,
    dtype: torch.dtype,
) -> Tensor:
    target = dtype if weight.is_floating_point() else weight.dtype
    if update is None:
        return weight.to(target).contiguous()
    if not weight.is_floating_point():
        raise UserError(f"{name} is stored as {weight.dtype}; merge into unquantised weights")
    if isinstance(update, NewRows):
        return _replace(name, weight, update, target)
    if isinstance(update, WholeWeight):
        return _instead(name, weight, update.values, target)
    shape = (update.b.shape[0], update.a.shape[1])
    if update.transposed:
        shape = shape[::-1]
    if shape != weight.shape:
        raise UserError(
            f"{name} has shape {tuple(weight.shape)} in the base and {shape} in the adapter: is "
            "this the model it was trained on?"
        )
    return _summed(name, weight, update, target)


def _summed(name: str, weight: Tensor, update: LowRankUpdate, dtype: torch.dtype) -> Tensor:
    """The sum of a weight and its update, in `dtype`; see `_is_sum` for how it is checked."""
    simple = update.plain and not update.transposed and weight.dtype == dtype
    summed = low_rank_sum(weight, update.a, update.b, update.scaling) if simple else None
    merged, squares = summed or _summed_in_blocks(weight, update, dtype)
    # The square of a number may be infinite where the number is not.
    if not (torch.isfinite(squares).all() or torch.isfinite(merged.float()).all()):
        raise UserError(f"{name} is not finite after merging into {dtype}")
    if not _is_sum(merged, weight, update, squares):
        raise UserError(
            f"the merged model does not compute what base and adapter do: {name} is not the sum of "
            "the base's weight and the adapter's update. The merge was discarded."
        )
    return merged


def _summed_in_blocks(
    weight: Tensor, update: LowRankUpdate, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`low_rank_sum` of any update, with torch; in blocks of rows where each has its own update."""
    rows = max(1, _BLOCK // weight.shape[1])
    if update.transposed or not update.plain:
        rows = len(weight)
    merged, squares = torch.empty(weight.shape, dtype=dtype), []
    for start in range(0, len(weight), rows):
        some = slice(start, start + rows)
        part = update if rows >= len(weight) else replace(update, b=update.b[some])
        merged[some] = part.added_to(weight[some])
        squares.append(merged[some].float().square().sum(0 if update.transposed else 1))
    return merged, torch.cat(squares)


def _is_sum(merged: Tensor, weight: Tensor, update: LowRankUpdate, squares: Tensor) -> bool:
    """Whether merged is weight + scaling * B @ A, rounded once.

    Both are multiplied with a row of random signs: a sum that is wrong differs there (Freivalds,
    "Probabilistic machines can use less running time", 1977). `squares` are the sums of squares of
    merged's rows. Updates that change more of the weight are left to the comparison of log-probs.
    """
    if not update.plain:
        return True
    if update.transposed:
        merged, weight = merged.T, weight.T
    a, b, width = update.a.float(), update.b.float(), weight.shape[1]
    signs = torch.randint(2, (1, width), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    expected = _multiplied(signs, weight) + update.scaling * (signs @ a.T) @ b.T
    difference = (_multiplied(signs, merged) - expected)[0].abs()
    numbers, single = torch.finfo(merged.dtype), torch.finfo(torch.float32)
    # Rounding's errors have random signs here, so that their sum is within a few standard
    # deviations of none; nine are exceeded once in 10^17 rows.
    sizes = squares.sqrt()
    changes = abs(update.scaling) * (b.abs() @ a.norm(dim=1))
    allowed = numbers.eps / 2 * sizes + width**0.5 * (
        single.eps * (sizes + 2 * changes) + numbers.tiny * numbers.eps
    )
    return bool((difference <= 9 * allowed).all())


def _multiplied(signs: Tensor, weight: Tensor) -> Tensor:
    """Rows [1, K] times a stored matrix [N, K], in float32."""
    return product(signs, weight.float() if weight.dtype == torch.float64 else weight)
