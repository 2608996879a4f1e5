"""Examples of records that are tokens already: nothing is added, and nothing is rendered."""

from __future__ import annotations

from itertools import chain

import numpy as np

from tandem.data.encoded.example import Branch, Example, preference_example
from tandem.data.records import TokenPair, TokenRecord
from tandem.data.tokenize.encode import ChatTokenizer, Encoded
from tandem.data.tokenize.template_capabilities import Refused
from tandem.data.tokenize.vocabulary import NoRow
from tandem.data.truncation.limits import Limits
from tandem.data.truncation.tokens import FittedTokens, fit_tokens

STRANGE = "an id that the tokenizer does not have: make the tokens with the model's own tokenizer"


def checked_tokens(
    chat: ChatTokenizer, record: TokenRecord, limits: Limits
) -> FittedTokens | Refused:
    """Return a record within the limits; refuse one with an id that the tokenizer does not have.

    Raises `NoRow`, with file and row, for an id that the model has no row for.
    """
    try:
        strange = chat.codec.strange(chain.from_iterable(_parts(record)))
    except NoRow as error:
        raise NoRow(f"{record.origin}: {error}") from None
    return fit_tokens(record, limits) if strange is None else Refused(STRANGE, f"id {strange}")


def _parts(record: TokenRecord) -> tuple[tuple[int, ...], ...]:
    if isinstance(record, TokenPair):
        return record.prompt, record.chosen, record.rejected
    return (record.ids,)


def token_example(record: TokenRecord) -> Example:
    """Return the example of a record: one path, or a pair's common prefix with two branches."""
    if isinstance(record, TokenPair):
        start = len(record.prompt)
        answers = (record.chosen, record.rejected)
        encoded = [Encoded([*record.prompt, *answer], start) for answer in answers]
        return preference_example(encoded, record.origin)
    nothing = Branch(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.bool_))
    path = Branch(np.array(record.ids, dtype=np.int32), np.array(record.trained, dtype=np.bool_))
    scores = () if record.good is None else (float(record.good),)
    return Example(nothing, (path,), record.origin, scores)
