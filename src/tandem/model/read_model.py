"""Reads a model's weights one layer at a time, each straight to the dtype and place that it gets.

transformers reads whole models; this is for those that may not be in memory as a whole, or not in
the dtype that they are loaded in.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from tandem.errors import UserError
from tandem.model.cpu.stored_weights import NARROW, kept
from tandem.model.empty_model import Places, empty_model, put
from tandem.model.unwrap import layers_of, plain_model
from tandem.model.weight_files import Part, opened, parts_of, read_headers

Kept = Callable[[nn.Module, str, Tensor], Tensor]
"""A stored tensor as the module that gets it under a name keeps it: its dtype, and its device."""
Changed = Callable[[str, Tensor], Tensor]
"""A stored tensor, by its name in memory, as it is to be instead."""


class ModelFolder:
    """The weights of a model folder, by their names in memory."""

    def __init__(self, folder: Path, model: Any) -> None:
        """`model` is of the class that the folder holds, with or without weights."""
        self.path, self._model = folder, model
        self._headers = read_headers(folder)
        self._parts: dict[str, list[Part]] = defaultdict(list)
        for part in parts_of(self._headers, model):
            for name in part.weights:
                self._parts[name].append(part)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The weights of these names that the files have, in the dtypes in which they are stored.

        Raises UserError for a damaged file, and for tensors that cannot be put together.
        """
        with ExitStack() as stack:
            files = {}

            def tensor(name: str) -> Tensor:
                file = self._headers[name].file
                if file not in files:
                    files[file] = stack.enter_context(opened(file))
                return files[file].get_tensor(name)

            found: dict[str, Tensor] = {}
            for name in names:
                pieces = []
                for part in self._parts.get(name, ()) if name not in found else ():
                    made = part.assembled({each: tensor(each) for each in part.names}, self._model)
                    pieces.append(made[name])
                if pieces:  # the experts of a mixture, in their order
                    found[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            return found


class Reader:
    """Fills the modules of an empty model from its folder."""

    def __init__(
        self,
        folder: Path,
        model: Any,
        kept: Kept,
        changed: Changed = lambda _, stored: stored,
    ) -> None:
        self._folder, self._kept, self._changed = ModelFolder(folder, model), kept, changed
        self._places = Places(model)
        self._tied: dict[tuple[str, ...], nn.Parameter] = {}

    def fill(self, modules: Iterable[nn.Module]) -> None:
        """Put the weights of modules, but not of those within them, where they belong.

        Raises UserError where the files lack one, or have it in another shape.
        """
        wanted = [
            (module, own, names) for module in modules for own, names in self._places.of(module)
        ]
        read = self._folder.read(name for _, _, names in wanted for name in names)
        for module, own, names in wanted:
            if (shared := self._tied.get(names)) is not None:
                module._parameters[own] = shared
                continue
            there: Any = getattr(module, own)
            # The files may have one or both of two tied weights.
            stored = next((read[name] for name in names if name in read), None)
            if stored is None and own in module._buffers:
                continue
            self._check(names[0], there, stored)
            assert stored is not None
            put(module, own, self._kept(module, own, self._changed(names[0], stored)))
            if len(names) > 1 and own in module._parameters:
                weight = module._parameters[own]
                assert weight is not None
                self._tied[names] = weight

    def _check(self, name: str, there: Tensor, stored: Tensor | None) -> None:
        folder = self._folder.path
        if stored is None:
            raise UserError(
                f"{folder} is not a whole model: {name} is in none of its files. Copy or download "
                "it again, or correct config.json."
            )
        if stored.shape != there.shape:
            raise UserError(
                f"{folder} cannot be loaded as a model: {name} has shape {tuple(stored.shape)} in "
                f"its files, and {tuple(there.shape)} by its config.json"
            )


def read_model(
    folder: Path,
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    stored: bool = False,
    filled: Callable[[Any, Sequence[nn.Module]], None] = lambda _, __: None,
) -> Any:
    """A model in evaluation mode, read layer by layer.

    Args:
        folder, config: of the model; transformers' configuration.
        dtype: that it computes in, and that its weights get.
        device: where it computes.
        stored: whether matrices stay as narrow as they are stored, see `stored_weights`.
        filled: called with the model, and modules that have got their weights: those of a layer, or
            one alone.
    """
    model = empty_model(config, dtype, device)
    reader = Reader(folder, model, kept_stored if stored else as_loaded(model, dtype, device))
    for modules in _in_turn(model):
        reader.fill(modules)
        filled(model, modules)
    return _with_generation(model, folder)


def read_in_layers(
    folder: Path,
    config: Any,
    *,
    dtype: torch.dtype,
    changed: Changed = lambda _, stored: stored,
) -> Any:
    """A model on the CPU whose decoder layers have their weights while they run, and no longer.

    `fill_layer` gives a layer its weights for good. Models whose layers are not known are whole.
    `changed` is applied to each weight as it is read, under the first of its names.
    """
    device = torch.device("cpu")
    model = empty_model(config, dtype, device)
    reader = Reader(folder, model, as_loaded(model, dtype, device), changed)
    layers = layers_of(model)
    for modules in _in_turn(model):
        if modules[0] not in layers:
            reader.fill(modules)
    model.tandem_layers = {layer: _OnDisk(reader, layer) for layer in layers}
    return _with_generation(model, folder)


def _in_turn(model: Any) -> Iterator[Sequence[nn.Module]]:
    """A model's modules: all of a layer together, others alone."""
    layers = layers_of(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in list(model.modules()):
        if id(module) not in inside:
            yield [module]
    for layer in layers:
        yield list(layer.modules())


def _with_generation(model: Any, folder: Path) -> Any:
    """A model that knows how its folder says to generate."""
    with suppress(OSError, ValueError):  # none there, or a damaged one, which nothing here reads
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def fill_layer(model: Any, layer: nn.Module) -> None:
    """Give a layer of a model its weights, if `read_in_layers` left them on disk."""
    if (on_disk := getattr(plain_model(model), "tandem_layers", {}).pop(layer, None)) is not None:
        on_disk.fill()


@contextmanager
def weights_of_module(model: Any, module: nn.Module) -> Iterator[None]:
    """Inside, a module has its weights, if `read_in_layers` left those of its layer on disk."""
    layers = getattr(plain_model(model), "tandem_layers", {})
    within = (one for layer, one in layers.items() if any(m is module for m in layer.modules()))
    on_disk = next(within, None)
    if on_disk is None:
        yield
        return
    on_disk.take()
    try:
        yield
    finally:
        on_disk.release()


class _OnDisk:
    """A layer whose weights are on disk but while it runs."""

    def __init__(self, reader: Reader, layer: nn.Module) -> None:
        self._reader, self._layer = reader, layer
        self._empty = {
            (module, own): weight
            for module in layer.modules()
            for own, weight in module.named_parameters(recurse=False)
        }
        self._handles = [
            layer.register_forward_pre_hook(lambda *_: self.take()),
            layer.register_forward_hook(lambda *_: self.release(), always_call=True),
        ]

    def take(self) -> None:
        """Read the weights."""
        self._reader.fill(self._layer.modules())

    def release(self) -> None:
        """Let the weights go."""
        for (module, own), weight in self._empty.items():
            module._parameters[own] = weight

    def fill(self) -> None:
        """Read the weights for good."""
        for handle in self._handles:
            handle.remove()
        self.take()


def as_loaded(model: Any, dtype: torch.dtype, device: torch.device) -> Kept:
    """Weights in a dtype, on a device; float32 where transformers loads them so in spite of it."""
    wide = [
        re.compile(rf"(^|\.){re.escape(part)}($|\.)")
        for part, planned in model._get_dtype_plan(dtype).items()
        if planned == torch.float32
    ]
    names = {id(module): name for name, module in model.named_modules()} if wide else {}

    def loaded(module: nn.Module, own: str, stored: Tensor) -> Tensor:
        if not stored.is_floating_point():
            return stored.to(device)
        name = f"{names.get(id(module), '')}.{own}"
        return stored.to(device, torch.float32 if any(w.search(name) for w in wide) else dtype)

    return loaded


def kept_stored(module: nn.Module, own: str, stored: Tensor) -> Tensor:
    """Matrices of linear layers and embeddings as they are stored, the rest in float32."""
    if kept(module) and own == "weight" and stored.dtype in NARROW:
        return stored
    return stored.float() if stored.is_floating_point() else stored
