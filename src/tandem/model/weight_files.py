"""How a model's files name and cut its weights, and how transformers puts them together in memory.

In files, names may have another prefix than in memory, and the experts of a mixture are one matrix
each instead of one tensor. transformers loads by rules; this file reads them in both directions, so
that what an adapter changed is written under the files' own names. Headers are read without torch
and transformers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from tandem.errors import UserError
from tandem.storage.hashing import weight_files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Number formats, as safetensors calls them, of weights that are not quantised.
FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
# Endings of an output head's name; the head may be the input embedding.
HEADS = ("lm_head.weight", "embed_out.weight")


@dataclass(frozen=True)
class Header:
    """What a file's header says of a tensor: its sizes, and its number format's name."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Part:
    """Tensors of the files that belong together, because a weight in memory is made of them."""

    names: tuple[str, ...]  # theirs, in the order in which they are put together
    # the names in memory of what they make; empty where the model has no use for them
    weights: tuple[str, ...]
    expert: int | None = None  # which entry of the weights' first axis they make, None for all
    converter: Any = None  # transformers' rule, None where they are only renamed
    # for each name, which of the rule's patterns it fits, and as which of those that do
    places: tuple[tuple[int, int], ...] = ()

    def assembled(self, tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """The weights by their names in memory; rules may ask for the configuration of `model`."""
        if self.converter is None:
            return dict.fromkeys(self.weights, tensors[self.names[0]])
        sources: dict[str, Any] = defaultdict(list)
        for name, (pattern, _) in zip(self.names, self.places, strict=True):
            sources[self.converter.source_patterns[pattern]].append(tensors[name])
        merged = self._run(self.converter, dict(sources), model)
        if len(self.weights) == 1:
            return dict.fromkeys(self.weights, *merged.values())
        patterns = zip(self.converter.target_patterns, self.weights, strict=True)
        return {weight: merged[pattern] for pattern, weight in patterns}

    def cut(self, weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
        """`assembled` the other way round."""
        if self.converter is None:
            return {self.names[0]: weights[self.weights[0]]}
        back = self.converter.reverse_transform()
        pairs = zip(back.source_patterns, self.weights, strict=True)
        pieces = self._run(back, {pattern: [weights[name]] for pattern, name in pairs}, model)
        tensors = {}
        for name, (pattern, number) in zip(self.names, self.places, strict=True):
            number = 0 if self.expert is not None else number
            tensors[name] = pieces[back.target_patterns[pattern].replace("*", str(number))]
        return tensors

    def _run(self, rule: Any, values: dict[str, Any], model: Any) -> dict[str, Tensor]:
        for operation in rule.operations:
            values = operation.convert(
                values, source_patterns=rule.source_patterns, target_patterns=rule.target_patterns,
                full_layer_name=self.weights[0], model=model, config=model.config,
                missing_keys=None,
            )  # fmt: skip
        return {k: v[0] if isinstance(v, list) else v for k, v in values.items()}


@contextmanager
def opened(path: Path, framework: Literal["pt", "np"] = "pt") -> Iterator[Any]:
    """A safetensors file; raises UserError for one that is damaged."""
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}. Copy or download it again.") from None


def stored_dtype(folder: Path) -> torch.dtype:
    """The number format that a model's weights are stored in."""
    from torch import bfloat16, float16, float32

    with opened(weight_files(folder)[0]) as file:
        dtypes = {file.get_tensor(name).dtype for name in list(file.keys())[:8]}
    return next((d for d in (bfloat16, float16) if d in dtypes), float32)


def read_headers(folder: Path) -> dict[str, Header]:
    """The headers of a model folder's weight files, by the tensors' names in them."""
    headers: dict[str, Header] = {}
    for shard in weight_files(folder):
        with opened(shard, "np") as file:
            for name in list(file.keys()):
                part = file.get_slice(name)
                headers[name] = Header(shard, tuple(part.get_shape()), part.get_dtype())
    return headers


def parts_of(names: Iterable[str], model: Any) -> list[Part]:
    """Map each tensor of a model's files to the parameter that transformers makes of it.

    `model` is of the class that reads them, with or without weights.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    there, prefix = model.state_dict(), model.base_model_prefix
    parts: list[Part] = []
    together: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in sorted(names, key=dot_natural_key):
        weight, pattern = rename_source_key(name, renamings, converters, prefix, there)
        if weight not in there and name in there:
            weight, pattern = rename_source_key(name, [], [], prefix, there)
        if weight not in there:
            parts.append(Part((name,), ()))
        elif pattern is None:
            parts.append(Part((name,), (weight,)))
        else:
            together[weight].append((pattern, name))
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    for first, members in together.items():
        parts += _converted(first, members, by_pattern[members[0][0]])
    return parts


def _converted(first: str, members: list[tuple[str, str]], rule: Any) -> list[Part]:
    """The parts that one rule makes of tensors: one for each expert where it stacks them."""
    from transformers.core_model_loading import MergeModulelist

    places, seen = [], dict.fromkeys(rule.source_patterns, 0)
    for pattern, _ in members:
        places.append((rule.source_patterns.index(pattern), seen[pattern]))
        seen[pattern] += 1
    before, own, after = first.partition(rule.target_patterns[0])
    weights = tuple(before + each + after for each in rule.target_patterns) if own else (first,)
    names = tuple(name for _, name in members)
    stacks = isinstance(rule.operations[0], MergeModulelist) and rule.operations[0].dim == 0
    if not stacks or len(set(seen.values())) > 1:
        return [Part(names, weights, None, rule, tuple(places))]
    experts: dict[int, list[tuple[str, tuple[int, int]]]] = defaultdict(list)
    for name, place in zip(names, places, strict=True):
        experts[place[1]].append((name, place))
    parts = []
    for number, tensors in sorted(experts.items()):
        stacked, fitting = zip(*tensors, strict=True)
        parts.append(Part(stacked, weights, number, rule, fitting))
    return parts


def check_sums(folder: Path, model: Any, changed: Iterable[str]) -> None:
    """Raise UserError, with the reason, for a weight whose change could not be merged.

    `model` is the base of `folder`, with or without weights; `changed` are names in memory. Only
    the files' headers are read.
    """
    headers = read_headers(folder)
    parts: dict[str, list[Part]] = defaultdict(list)
    for part in parts_of(headers, model):
        for name in part.weights:
            parts[name].append(part)
    sizes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied: dict[int, list[str]] = defaultdict(list)
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in named.items():
        tied[id(weight)].append(name)
    for name in changed:
        # The files may have one or both of two tied weights.
        if not any(parts[own] for own in tied[id(named.get(name))] or [name]):
            raise UserError(
                f"{folder} has no weight for {name} in its files, so an adapter of it could not be "
                "merged. Copy or download the folder again, or correct config.json."
            )
        for part in parts[name]:
            if why := _trouble(part, headers, sizes, model):
                raise UserError(
                    f"an adapter of {name} could not be merged into the files of {folder}: {why}"
                )


def _trouble(
    part: Part, headers: Mapping[str, Header], sizes: Mapping[str, tuple[int, ...]], model: Any
) -> str | None:
    """Why an update cannot be added to a part's tensors; None when it can."""
    import torch

    for name in part.names:
        if headers[name].dtype not in FLOATS:
            return (
                f"{name} is stored as {headers[name].dtype}, which is quantised. Take the model's "
                "16-bit edition."
            )
    way_out = (
        "Leave its layers out with lora.target_modules, or load the model with transformers and "
        "save it with save_pretrained(FOLDER, save_original_format=False)."
    )
    tensors = {name: torch.empty(headers[name].shape, device="meta") for name in part.names}
    try:
        weights = part.assembled(tensors, model)
        back = part.cut(weights, model)
    except Exception as error:  # rules are as many as models
        return f"{part.names[0]} cannot be taken out of it again ({error!r}). {way_out}"
    for name, tensor in weights.items():
        wanted = sizes[name] if part.expert is None else (1, *sizes[name][1:])
        if tuple(tensor.shape) != wanted:
            return (
                f"{part.names[0]} makes a weight of shape {tuple(tensor.shape)}, config.json asks "
                f"for {sizes[name]}. Copy or download the folder again, or correct config.json."
            )
    if any(tuple(back[name].shape) != headers[name].shape for name in part.names):
        return f"{part.names[0]} cannot be taken out of it again. {way_out}"
    return None
