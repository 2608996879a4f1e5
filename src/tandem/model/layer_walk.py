"""Compares a base, base + adapter and merged model while each layer is in memory once.

The model is built without weights. Its own forward runs over three copies of the probe texts, one
behind the other in the batch. Each layer takes its weights when it is called, computes the three
copies with the weights of the three models, and lets them go.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tandem.errors import UserError
from tandem.model.added_tokens import grow_vocabulary, rows_of
from tandem.model.cpu.onednn_linear import speed_up_frozen_products
from tandem.model.cpu.stored_weights import NARROW, is_stored, keep_stored, kept
from tandem.model.empty_model import Places, empty_model, forget, put
from tandem.model.lora.adapter import (
    added_ids_of_folder,
    switch_adapters,
    wrap_with_saved,
)
from tandem.model.lora.adapter_folder import check_copies, read_updates
from tandem.model.lora.started import is_wrapper
from tandem.model.merge_weights import WeightPair
from tandem.model.model_folder import first_line
from tandem.model.unwrap import layers_of

# Up to so many rows, reading a matrix as it is stored is faster than widening it.
_SLIM_ROWS = 16
_MODELS = 3  # base, base + adapter, merged
Take = Callable[[str], WeightPair | None]
"""Gives a weight by its name, None where the files have no tensor of it."""


class CannotWalkError(Exception):
    """A model's layers cannot be computed one at a time; the message says why."""


@dataclass(frozen=True)
class ProbeLogps:
    """Log-probs of the probe texts' tokens, each given those before it, [tokens] float64."""

    base: Tensor
    adapted: Tensor
    merged: Tensor


def walk(
    config: Any,
    adapter: Path,
    probes: Sequence[Sequence[int]],
    take: Take,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> ProbeLogps:
    """Compute the log-probs of probe texts by three models, layer by layer.

    Args:
        config: transformers' configuration of the base.
        adapter: the folder of a saved adapter.
        probes: token ids of each text.
        dtype, device: of the computation.

    Raises CannotWalkError for a model whose layers cannot be computed one at a time, and UserError
    for an adapter that does not fit the model.
    """
    ids = _padded(probes).repeat(_MODELS, 1).to(device)  # [3P, L]
    try:
        model = _wrapped_model(config, adapter, take, dtype=dtype, device=device, rows=len(ids))
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits  # [3P, L, V]
    except (UserError, OSError, CannotWalkError):
        raise
    except Exception as error:  # models are of many kinds
        raise CannotWalkError(first_line(error)) from error
    logps = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None])
    logps = logps[..., 0].cpu().double()
    return ProbeLogps(
        *(
            torch.cat([row[: len(probe) - 1] for row, probe in zip(rows, probes, strict=True)])
            for rows in logps.chunk(_MODELS)
        )
    )


def _wrapped_model(
    config: Any, adapter: Path, take: Take, *, dtype: torch.dtype, device: torch.device, rows: int
) -> Any:
    """The base without weights, with the adapter, whose layers compute a batch of `rows` thrice."""
    model = empty_model(config, dtype, device)
    layers = {id(layer) for layer in layers_of(model)}
    if not layers:
        raise CannotWalkError(f"the layers of {type(model).__name__} are not known")
    if missing := [index for index in added_ids_of_folder(adapter) if index >= rows_of(model)]:
        grow_vocabulary(model, missing)
        forget(model, device)
    weights = _Weights(model, take, dtype, device)
    if copies := check_copies(adapter, weights.before):
        raise CannotWalkError(f"the adapter brings a copy of {copies[0]}")
    plain = all(update.plain for update in read_updates(adapter, model).values())
    if plain and dtype == torch.float32 and device.type == "cpu":
        # Weights stay as they are stored, and products go the way that they go everywhere.
        keep_stored(model)
        speed_up_frozen_products(model, slim_rows=_SLIM_ROWS)
    wrap_with_saved(model, adapter)
    for unit in list(_units(model, layers)):
        if layers & {id(module) for module in unit.modules()} - {id(unit)}:
            raise CannotWalkError(f"{type(unit).__name__} has weights beside its layers")
        unit.forward = partial(_by_each_model, unit, unit.forward, weights, rows)
    return model


def _padded(probes: Sequence[Sequence[int]]) -> Tensor:
    """Token ids [P, L], L no multiple of 3P, so that the axis of a batch is known by its size.

    What follows a text changes nothing of what comes before it.
    """
    length = max(len(probe) for probe in probes)
    length += length % (_MODELS * len(probes)) == 0
    rows = [[*probe, *[probe[-1]] * (length - len(probe))] for probe in probes]
    return torch.tensor(rows)


def _units(module: nn.Module, layers: Collection[int]) -> Iterator[nn.Module]:
    """The modules whose weights are in memory together: layers, and others that have some."""
    owns = any(True for _ in module.parameters(recurse=False))
    if id(module) in layers or owns or is_wrapper(module):
        yield module
        return
    for child in module.children():
        yield from _units(child, layers)


class _Weights:
    """Puts a model's weights into its modules, and takes them out again."""

    def __init__(
        self, model: nn.Module, take: Take, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._take, self._dtype, self._device = take, dtype, device
        self._model = model
        self._places = Places(model)

    def before(self, name: str) -> Tensor | None:
        """A weight of the base, by its name."""
        pair = self._pair(self._places.alike(name))
        return None if pair is None else pair.before

    def of(self, unit: nn.Module) -> list[tuple[nn.Module, str, WeightPair]]:
        """The weights of a module and all within it, with where they belong."""
        found = []
        for module in unit.modules():
            for own, names in self._places.of(module):
                if (pair := self._pair(names)) is not None:
                    found.append((module, own, pair))
        return found

    def put(self, module: nn.Module, own: str, values: Tensor) -> None:
        """Give a module a weight, or a buffer, longer by what it has more rows."""
        there = module._parameters.get(own)
        place = module._buffers[own] if there is None else there
        assert place is not None
        stays = is_stored(self._model) and kept(module)
        if not (stays and values.dtype in NARROW):
            dtype = self._dtype if place.is_floating_point() else place.dtype
            values = values.to(self._device, dtype)
        if values.shape != place.shape and values.shape[1:] == place.shape[1:]:
            more = values.new_zeros(place.shape[0] - values.shape[0], *values.shape[1:])
            values = torch.cat([values, more + values.mean(0)])
        put(module, own, values)

    def _pair(self, names: Sequence[str]) -> WeightPair | None:
        # The files may have one or both of two tied weights.
        return next((pair for name in names if (pair := self._take(name))), None)


def _by_each_model(
    unit: nn.Module,
    plain: Callable[..., Any],
    weights: _Weights,
    rows: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Compute a third of the batch with the weights of each model."""
    held = weights.of(unit)
    empty = {(module, own): getattr(module, own) for module, own, _ in held}

    def third(number: int, *, adapted: bool) -> Any:
        switch_adapters(unit, on=adapted)
        some, named = _third((args, kwargs), number, rows)
        return plain(*some, **named)

    for module, own, pair in held:
        weights.put(module, own, pair.before)
    outputs = [third(0, adapted=False), third(1, adapted=True)]
    for module, own, pair in held:
        weights.put(module, own, pair.merged)
    outputs.append(third(2, adapted=False))
    for (module, own), tensor in empty.items():
        if own in module._parameters:
            module._parameters[own] = tensor
    return _joined(outputs, rows)


def _third(value: Any, number: int, rows: int) -> Any:
    """One model's rows of all tensors that have some for the batch; other values as they are."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] % rows == 0:
        return value.chunk(_MODELS)[number]
    if isinstance(value, tuple | list):
        return type(value)(_third(one, number, rows) for one in value)
    if isinstance(value, dict):
        return {key: _third(one, number, rows) for key, one in value.items()}
    return value


def _joined(outputs: Sequence[Any], rows: int) -> Any:
    """The models' outputs as one; those that are the same for all rows, as positions', repeated."""
    first = outputs[0]
    if isinstance(first, Tensor):
        alike = first.shape[0] == 1
        return torch.cat(
            [one.expand(rows // _MODELS, *first.shape[1:]) if alike else one for one in outputs]
        )
    if isinstance(first, tuple | list):
        return type(first)(_joined(each, rows) for each in zip(*outputs, strict=True))
    if first is None:
        return None
    raise CannotWalkError(f"a layer returns {type(first).__name__}")
