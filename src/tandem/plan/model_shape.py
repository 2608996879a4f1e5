"""A model's shape from its configuration alone: no weights are read, none are allocated."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tandem.data.tokenize.vocabulary import AddedTokens
from tandem.errors import UserError
from tandem.model.added_tokens import make_rows
from tandem.model.attention.packing_probe import declared_obstacle
from tandem.model.full.full_weights import FullWeights
from tandem.model.lora.adapter import LoraWeights
from tandem.model.lora.principal import beginnings
from tandem.model.lora.targets import refused_modules, unreached_layers
from tandem.model.model_folder import model_without_weights
from tandem.model.unwrap import plain_head, plain_model
from tandem.recipe.training_settings import LoraSettings

# A layer's parameters: everything up to the first number in their names.
_LAYER = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True)
class ModelShape:
    """Sizes that operations and memory follow from."""

    parameters: int  # of the base, tied ones once
    trained: int  # of the adapter, or all
    full: bool  # whether all are trained, and none is an adapter's
    edges: int  # rows and columns of its matrices, added up
    # multiplications of a token in the decoder's frozen linear layers; of a mixture's experts those
    # that a token reaches
    linear: int
    adapter: int  # the same in the adapter
    attention: int  # multiplications of a visible (query, key) pair, all layers together
    head: int  # multiplications of a token in the output head
    in_linear: int  # parameters in linear layers other than the head, which quantization packs
    plain: int  # those of them in torch's own linear layers, whose weights a CPU may order
    decomposed: int  # outputs of layers with DoRA, of which a token keeps each once more
    kept: int  # numbers that the adapter began as and is saved with; not trained
    largest_layer: int  # parameters of the largest layer, which sharded engines gather at once
    # of the decoder
    hidden: int
    layers: int


@dataclass(frozen=True)
class Described:
    """A model as far as its configuration says."""

    shape: ModelShape  # with its adapter
    padded: bool  # whether it will be fed padded rows
    reached: bool  # whether it is known which layers an adapter can act on


def described(
    config: Any,
    lora: LoraSettings | None,
    *,
    attention: str,
    added: AddedTokens | None = None,
    trains_added: bool = True,
) -> Described:
    """The model that a configuration describes, with its adapter, on torch's meta device.

    Without `lora` all its weights are trained. `attention` is the recipe's, `added` tokens whose
    embeddings are trained, by the adapter if `trains_added`. Raises UserError for a configuration
    that describes no model, for one whose sizes have other names, and for an adapter that fits
    none of its modules.
    """
    model = model_without_weights(config)
    if added:
        make_rows(model, added)
    listed = lora is None or lora.target_modules != "all-linear"
    unread = refused_modules(model) if listed else _out_of_reach(model)
    padded = attention == "padded" or (attention == "auto" and declared_obstacle(model) is not None)
    if lora is None:
        adapted = FullWeights(Path()).attach(model)
    else:
        adapted = LoraWeights(lora).attach(
            model,
            unreached=refused_modules(model) if unread is None else unread,
            added_ids=added.ids if added and trains_added else (),
        )
    try:
        shape = shape_of(adapted)
    except (AttributeError, TypeError, ValueError) as error:  # sizes by names of their own
        raise UserError(
            f"plan: the sizes of a {type(model).__name__} are not where other models have them "
            f"({error}), so that nothing can be said of it before a run"
        ) from None
    return Described(shape, padded, unread is not None)


def shape_of(model: Any) -> ModelShape:
    """The shape of a model with an adapter or trained as a whole, wherever its weights are."""
    base = plain_model(model)
    full = model is base
    text = base.config.get_text_config()
    head: Any = plain_head(base.get_output_embeddings())
    share = _reached(text)
    linear = adapter = 0.0
    in_linear = plain = 0
    # A layer that began as a part of its weight multiplies with its beginning as well.
    kept = sum(began.a.numel() + began.b.numel() for began in beginnings(base))
    again = 2 if kept else 1
    for name, module in base.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is head:
            continue
        if ".lora_" in name and not module.weight.requires_grad:
            continue  # an adapter that is kept as it was
        if ".modules_to_save." in name:
            continue  # computes in place of the one that it was copied from
        size = _size(module)
        reached = size * (share if "experts" in name else 1.0)
        if ".lora_" in name:
            adapter += reached * again
        else:
            linear += reached
            in_linear += size
            plain += size if isinstance(module, nn.Linear) else 0
    parameters = trained = edges = decomposed = 0
    layers: Counter[str] = Counter()
    for name, parameter in base.named_parameters():
        size = _numbers(parameter)
        if parameter.requires_grad:
            trained += size
            parameters += size if full else 0
            edges += sum(parameter.shape) if parameter.dim() == 2 else 0
            decomposed += size if "lora_magnitude_vector" in name else 0
        beside = ".lora_" in name or ".modules_to_save." in name
        if beside or (parameter.requires_grad and not full):
            continue
        parameters += 0 if full else size
        layer = _LAYER.match(name)
        layers[layer.group(1) if layer else name] += size
        if parameter.dim() == 3 and "experts" in name:
            linear += size * share
    return ModelShape(
        parameters=parameters,
        trained=trained,
        full=full,
        edges=edges,
        linear=round(linear),
        adapter=round(adapter),
        attention=_attention(text),
        head=_size(head),
        in_linear=in_linear,
        plain=plain,
        decomposed=decomposed,
        kept=kept,
        largest_layer=max(layers.values()),
        hidden=int(text.hidden_size),
        layers=int(text.num_hidden_layers),
    )


def _out_of_reach(model: Any) -> list[str] | None:
    """See `targets.unreached_layers`; None for a forward that needs the numbers of its tensors."""
    try:
        return unreached_layers(model)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


def _size(layer: Any) -> int:
    """Multiplications of a linear layer for one token; 4-bit weights are packed, its sizes not."""
    if isinstance(layer, nn.Linear):
        return layer.in_features * layer.out_features
    return int(layer.weight.numel())


def _numbers(parameter: Tensor) -> int:
    """Numbers in a parameter; two to a byte where it is packed."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def _reached(text: Any) -> float:
    """Share of a mixture's experts that a token goes through."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    there = next((int(n) for n in (getattr(text, name, None) for name in names) if n), 0)
    chosen = getattr(text, "num_experts_per_tok", None)
    return min(1.0, int(chosen) / there) if there and chosen else 1.0


def _attention(text: Any) -> int:
    """Multiplications of one visible pair: its score and its value, in every layer and head."""
    heads = getattr(text, "num_attention_heads", None)
    if not heads:
        return 0
    kinds = getattr(text, "layer_types", None)
    layers = sum("attention" in kind for kind in kinds) if kinds else int(text.num_hidden_layers)
    size = getattr(text, "head_dim", None) or int(text.hidden_size) // int(heads)
    return 2 * int(size) * int(heads) * layers
