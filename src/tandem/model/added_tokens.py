"""Tokens whose rows of the embeddings are trained: new ones start as the mean of all rows.

peft trains single rows of an embedding (`trainable_token_indices`); this file says which, reads
their present values, and finds those that were never trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tandem.data.records import Turn
from tandem.data.tokenize.chat_template import ChatTemplate, find_ending, prompt_ids, stop_ids
from tandem.data.tokenize.vocabulary import AddedTokens
from tandem.errors import UserError
from tandem.model.weight_files import FLOATS, HEADS, opened, read_headers
from tandem.storage.hashing import weight_files


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


def described_rows(config: Any, added: AddedTokens | None = None) -> int:
    """Rows of the model that a configuration describes, with those that added tokens get."""
    rows = int(config.get_text_config().vocab_size)
    return max([rows, *(index + 1 for index in (added.ids if added else ()))])


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


# Rows whose cosine is above this are nearly one direction. Of two small models (the embedded demo's
# base and stories260K) 799 of 2048 and 272 of 512 rows have another one above it, and only 2 and 10
# have their nearest between 0.85 and it: there is a gap between rows that were trained apart and
# rows that were not.
_ALIKE = 0.98
# A single near-equal row may be a token that is used alike, such as a second end token. Untrained
# rows come in larger groups. Only rows that were made of one mean may be two, and they are equal.
_FEWEST = 2
_SAME = 0.9999
# A row this much shorter than the median one was never trained: it began as 0, or decayed to 0.
_EMPTY = 0.01
# Bytes of float32 rows that are compared at once.
_BLOCK = 64 * 2**20
_INPUTS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
           "embeddings.weight", "tok_embeddings.weight")  # fmt: skip


@dataclass(frozen=True)
class Untrained:
    """A token, as the template writes it, whose row was never trained."""

    token: str
    alike: int  # how many other rows are nearly equal to it
    empty: bool  # whether it is nearly 0
    # whether it ends answers, and the row is of the output head; else of the input embedding
    ends: bool


def untrained_tokens(
    folder: Path, config: Any, tokenizer: Any, template: ChatTemplate, trained: Collection[int] = ()
) -> list[Untrained]:
    """The template's control tokens whose rows were never trained, those that end answers first.

    A token that ends answers is looked at in the output head, where it is predicted; the others in
    the input embedding, where they are fed. Rows of `trained` ids, which the stage trains, are left
    out. Nothing is found without weights, nor in a matrix under an unknown family's name. Raises
    UserError for a damaged file.
    """
    tokens = control_tokens(tokenizer, template)
    ends = set(stop_ids(tokenizer, template)[:1])
    wanted = {token: index for token, index in tokens.items() if index not in trained}
    try:
        weight_files(folder)
    except UserError:  # reported when they are loaded
        return []
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    rows = int(config.get_text_config().vocab_size)
    matrices = {
        name: header.file
        for name, header in read_headers(folder).items()
        if len(header.shape) == 2 and header.shape[0] >= rows and header.dtype in FLOATS
    }
    inputs, head = _first(matrices, _INPUTS), _first(matrices, HEADS)
    if head is None and tied:
        head = inputs
    untrained: list[Untrained] = []
    for place, predicted in ((head, True), (inputs, False)):
        some = {token: i for token, i in wanted.items() if (i in ends) == predicted and i < rows}
        if place is not None and some:
            untrained += _compared(*place, some, ends=predicted)
    return untrained


def control_tokens(tokenizer: Any, template: ChatTemplate) -> dict[str, int]:
    """The special and added tokens that a template writes around turns, the ending first, by id."""
    question, answer = Turn("user", "Which?"), Turn("assistant", "That.")
    system = (Turn("system", "Answer."),)
    for before in (system, ()):  # templates may refuse a system turn, or a second question
        try:
            ids = prompt_ids(tokenizer, template, (*before, question, answer, question))
            break
        except UserError:
            continue
    else:
        ids = prompt_ids(tokenizer, template, (question,))
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    first = [] if (ending := find_ending(tokenizer, template)) is None else [ending.token_id]
    tokens_by_id = {
        index: str(tokenizer.convert_ids_to_tokens(index))
        for index in [*first, *ids]
        if index in special
    }
    # Some tokenizers have runs of blanks as added tokens.
    return {token: index for index, token in tokens_by_id.items() if token.strip()}


def in_words(untrained: Collection[Untrained]) -> str | None:
    """What such rows mean, and the way out; None if there are none."""
    if not untrained:
        return None
    parts = [_end(one) for one in untrained if one.ends]
    if fed := [one for one in untrained if not one.ends]:
        names = ", ".join(repr(one.token) for one in fed)
        parts.append(
            f"the template writes {names}, which this model has never read: "
            f"{'its row' if len(fed) == 1 else 'their rows'} in the input embedding "
            f"{'says' if len(fed) == 1 else 'say'} nothing (nearly equal to others, or 0)"
        )
    listing = ", ".join(f'"{one.token}"' for one in untrained)
    flags = " ".join(f"'{one.token}'" for one in untrained)
    return (
        f"{'; '.join(parts)}. Train {'this row' if len(untrained) == 1 else 'these rows'}: "
        f"`added_tokens: [{listing}]` in the recipe, `--added_tokens {flags}` for a stage."
    )


def _end(one: Untrained) -> str:
    if one.alike:
        what = (
            f"is nearly equal to those of {one.alike} other tokens (cosine above {_ALIKE}), so "
            "that it can hardly become likelier than they are"
        )
    else:
        what = "is nearly 0, so that its logit is, too"
    return (
        f"the model cannot learn to stop: answers end with {one.token!r}, whose row in the frozen "
        f"output head was never trained and {what}"
    )


def _first(matrices: Mapping[str, Path], endings: tuple[str, ...]) -> tuple[Path, str] | None:
    """File and name of the first matrix whose name has one of these endings."""
    return next(((file, name) for name, file in matrices.items() if name.endswith(endings)), None)


def _compared(path: Path, name: str, tokens: Mapping[str, int], *, ends: bool) -> list[Untrained]:
    """Which of the tokens' rows of a matrix are 0 or nearly equal to others; read in blocks."""
    with opened(path) as file:
        part = file.get_slice(name)
        own = torch.cat([part[index : index + 1] for index in tokens.values()]).float()
        lengths = []
        alike, same = torch.zeros(2, len(tokens), dtype=torch.int64)
        directions = own / own.norm(dim=1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)
        for block in _blocks(part):
            norms = block.norm(dim=1)
            lengths.append(norms)
            cosines = block @ directions.T / norms.clamp_min(torch.finfo(block.dtype).tiny)[:, None]
            alike += (cosines > _ALIKE).sum(dim=0)
            same += (cosines > _SAME).sum(dim=0)
    short = _EMPTY * float(torch.cat(lengths).median())
    untrained = []
    for number, token in enumerate(tokens):
        length = float(own[number].norm())
        # The row itself is among those that are counted, unless its length is 0.
        others = int(alike[number]) - 1 if length else 0
        if length < short or others >= _FEWEST or (length and int(same[number]) > 1):
            untrained.append(Untrained(token, others, length < short, ends))
    return untrained


def _blocks(part: Any) -> Iterator[Tensor]:
    rows, width = part.get_shape()
    step = max(1, _BLOCK // (4 * width))
    for start in range(0, rows, step):
        yield part[start : start + step].float()
