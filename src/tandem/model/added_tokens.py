"""Tokens whose rows of the embeddings are trained: new ones start as the mean of all rows.

peft trains single rows of an embedding (`trainable_token_indices`); this file says which, and reads
their present values.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tandem.data.tokenize.vocabulary import AddedTokens
from tandem.errors import UserError


@dataclass(frozen=True)
class TrainedRows:
    """Rows of an output head that are trained: their token ids [n] int64 and values [n, H]."""

    ids: Tensor
    values: Tensor


def check_added(added: Collection[str], *, engine: str, sharded: bool) -> None:
    """Raise UserError where an engine that shards the base cannot train rows of added tokens."""
    if added and sharded:
        raise UserError(
            f"added_tokens: the engine {engine} spreads the embeddings over the processes, and "
            "single rows of them cannot be trained there. Use `engine: ddp` (or "
            "`deepspeed-zero2`), or start from a model that has learnt the tokens, such as the "
            "merged model of an SFT with added_tokens."
        )


def rows_of(model: Any) -> int:
    """How many rows a model's input embedding has; higher ids have none."""
    return int(model.get_input_embeddings().weight.shape[0])


def make_rows(model: Any, added: AddedTokens) -> None:
    """Make rows for the tokens that have none; see `grow_vocabulary`.

    Tokens that the tokenizer already had start from their own rows, so that the adapter changes
    nothing before its first step.
    """
    rows = rows_of(model)
    without = sorted({*added.new.values(), *(i for i in added.known.values() if i >= rows)})
    if without:
        grow_vocabulary(model, without)


def make_missing_rows(model: Any, ids: Sequence[int]) -> None:
    """Append the rows that a model lacks of these, for an adapter that brings their values."""
    rows = rows_of(model)
    if missing := [index for index in ids if index >= rows]:
        grow_vocabulary(model, missing)


def grow_vocabulary(model: Any, ids: Sequence[int]) -> None:
    """Give new tokens rows in the input and output embeddings: the mean of all rows before them.

    Rows of a padded vocabulary are used first. The mean is plain, in float64, so that every process
    gets the same bits. The ids follow those that the model knows. Raises UserError if the model
    lacks rows for tokens that its tokenizer had before, or has a head with a bias.
    """
    rows, first = model.get_input_embeddings().weight.shape[0], min(ids)
    if rows < first:
        raise UserError(
            f"added_tokens: the tokenizer has {first} tokens before these, but "
            f"{type(model).__name__} has embeddings for {rows} only: are these files of one "
            f"model? If they are, name the tokens with the ids {rows} to {first - 1} as well."
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError(
            f"added_tokens: the output head of {type(model).__name__} has a bias, whose new "
            "entries are not trained; choose a chat_template that needs no new tokens"
        )
    if rows <= max(ids):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    place = torch.tensor(list(ids), device=model.device)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in layers}.values():
            weight[place] = weight[:first].double().mean(0).to(weight.dtype)


def embedding_names(model: Any) -> list[str]:
    """The modules whose rows are trained: the input embedding, and a head of its own."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    if layers[0].weight is layers[1].weight:
        layers.pop()
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer)] for layer in layers]


def trained_rows(layer: Any) -> TrainedRows | None:
    """The rows of an output layer that an adapter replaces now; None while there are none."""
    wrapped: Any = getattr(layer, "token_adapter", None)
    if wrapped is None or wrapped.disable_adapters or wrapped.merged:
        return None
    (name,) = wrapped.active_adapters
    weight: nn.Parameter = wrapped.base_layer.weight
    ids = torch.tensor(wrapped.token_indices[name], device=weight.device)
    # Rounded as peft does, and as they will be when merged.
    return TrainedRows(ids, wrapped.trainable_tokens_delta[name].to(weight.dtype))
