"""Examples of raw text: every token of a document is trained, in as many pieces as it takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.data.encoded.example import Branch, Example
from tandem.data.records import Document, Origin
from tandem.data.tokenize.codec import Codec
from tandem.data.tokenize.template_capabilities import Refused
from tandem.data.tokenize.vocabulary import NoRow
from tandem.data.truncation.limits import NOTHING_LEFT
from tandem.errors import UserError


def document_ids(codec: Codec, documents: Sequence[Document]) -> list[list[int]]:
    """Return the ids of each text as the tokenizer encodes it, between BOS, if any, and EOS.

    A text that begins or ends with the token itself gets no second one. Raises `UserError` for a
    tokenizer without EOS, `NoRow` for a token that the model has no row for.
    """
    if documents and codec.eos_token_id is None:
        raise UserError(
            f"{documents[0].origin}: raw text ends with the tokenizer's EOS token, and it has "
            "none. Name one as `eos_token` in the model's tokenizer_config.json."
        )
    try:
        codec.strange(one for one in (codec.bos_token_id, codec.eos_token_id) if one is not None)
        encoded = codec.tokenize([one.text for one in documents])
    except NoRow as error:
        raise _of_document(codec, documents, error) from None
    return [_delimited(codec, ids) for ids in encoded]


def _delimited(codec: Codec, ids: list[int]) -> list[int]:
    bos, eos = codec.bos_token_id, codec.eos_token_id
    before = [bos] if bos is not None and ids[:1] != [bos] else []
    after = [eos] if eos is not None and ids[-1:] != [eos] else []
    return [*before, *ids, *after]


def _of_document(codec: Codec, documents: Sequence[Document], error: NoRow) -> NoRow:
    """Return the error of the first document that has it, with its file and row."""
    for document in documents:
        try:
            codec.tokenize([document.text])
        except NoRow as own:
            return NoRow(f"{document.origin}: {own}")
    return error


def document_pieces(ids: Sequence[int], most: int, origin: Origin) -> list[Example] | Refused:
    """Return a document's examples, each of at most `most` tokens.

    A later piece begins with the last token of the one before, which predicts the next. So each
    token but the first is the target of one piece.
    """
    if most < 2 or len(ids) < 2:
        return Refused(NOTHING_LEFT, f"{len(ids)} tokens, max_length {most}")
    starts = range(0, len(ids) - 1, most - 1)
    return [_piece(ids[start : start + most], origin) for start in starts]


def joined_pieces(pieces: Sequence[Example]) -> Example:
    """Return a document's pieces as one example, as long as all of it."""
    first, *rest = (piece.branches[0].input_ids for piece in pieces)
    return _piece(np.concatenate([first, *(ids[1:] for ids in rest)]), pieces[0].origin)


def _piece(ids: Sequence[int] | np.ndarray, origin: Origin) -> Example:
    nothing = Branch(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_))
    trained = np.ones(len(ids), dtype=np.bool_)
    trained[0] = False
    return Example(nothing, (Branch(np.array(ids, dtype=np.int32), trained),), origin)
