"""Tokens that a chat template writes and a model has never read, found without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tandem.data.records import Turn
from tandem.data.tokenize.chat_template import ChatTemplate, find_ending, prompt_ids, stop_ids
from tandem.errors import UserError
from tandem.model.weight_files import FLOATS, HEADS, read_headers
from tandem.storage.hashing import weight_files

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
# Bytes of rows in float32 that are compared at once.
_BLOCK = 64 * 2**20
_TINY = np.finfo(np.float32).tiny
# Number formats by their names in safetensors files.
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
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
    """The special and added tokens that a template writes, with their ids, the ending first."""
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


@np.errstate(all="ignore")  # rows that are not finite are like no other
def _compared(path: Path, name: str, tokens: Mapping[str, int], *, ends: bool) -> list[Untrained]:
    """Which of the tokens' rows of a matrix are 0 or nearly equal to others; read in blocks."""
    matrix = _matrix(path, name)
    own = _as_float32(matrix[list(tokens.values())])
    own_lengths = np.linalg.norm(own, axis=1)
    directions = own / np.maximum(own_lengths, _TINY)[:, None]
    lengths = []
    alike, same = np.zeros((2, len(tokens)), dtype=np.int64)
    step = max(1, _BLOCK // (4 * matrix.shape[1]))
    for start in range(0, len(matrix), step):
        block = _as_float32(matrix[start : start + step])
        norms = np.linalg.norm(block, axis=1)
        lengths.append(norms)
        cosines = block @ directions.T / np.maximum(norms, _TINY)[:, None]
        alike += (cosines > _ALIKE).sum(axis=0)
        same += (cosines > _SAME).sum(axis=0)
    ascending = np.sort(np.concatenate(lengths))
    short = _EMPTY * float(ascending[(len(ascending) - 1) // 2])
    untrained = []
    for number, token in enumerate(tokens):
        length = float(own_lengths[number])
        # The row itself is among those that are counted, unless its length is 0.
        others = int(alike[number]) - 1 if length else 0
        if length < short or others >= _FEWEST or (length and int(same[number]) > 1):
            untrained.append(Untrained(token, others, length < short, ends))
    return untrained


def _matrix(path: Path, name: str) -> NDArray[Any]:
    """Map a matrix of a safetensors file; bfloat16, which numpy lacks, as uint16."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))[name]
    start = 8 + size + header["data_offsets"][0]
    return np.memmap(path, _NUMPY[header["dtype"]], "r", start, tuple(header["shape"]))


def _as_float32(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Copy rows as float32, uint16 being the upper halves of it."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)
