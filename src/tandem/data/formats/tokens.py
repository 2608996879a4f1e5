"""Rows that are tokens already: ids, and which of them are trained. The keys are TRL's."""

from __future__ import annotations

from itertools import count

from tandem.data.formats.format import Fields, InvalidRecord
from tandem.data.records import Origin, TokenPair, TokenRow

UNTRAINED = -100  # the label of a token that is no target, as torch's cross-entropy has it
# Ids beyond this are those of no vocabulary; encoded data keeps them as 32-bit integers.
_MOST = 2**31 - 1


def read_token_row(fields: Fields, origin: Origin) -> list[TokenRow]:
    """`input_ids` and `labels`, optionally `attention_mask`, lists of one length.

    A label is -100, or the id at its own place where that token is a target. Tokens behind the last
    target influence nothing and are left off, as turns behind the last answer are.
    """
    ids, labels = _ids(fields, "input_ids"), fields.get("labels")
    if not isinstance(labels, list):
        raise InvalidRecord("`labels` is not a list of whole numbers")
    if len(labels) != len(ids):
        detail = f"{len(labels)} labels, {len(ids)} ids"
        raise InvalidRecord("`labels` and `input_ids` have different lengths", detail)
    for place, label, index in zip(count(1), labels, ids, strict=False):
        if type(label) is not int or label not in (UNTRAINED, index):
            raise InvalidRecord(
                "a label is neither -100 nor the id at its place (labels are not shifted)",
                f"place {place}: label {label!r}, id {index}",
            )
    _check_mask(fields.get("attention_mask"), len(ids))
    trained = [label != UNTRAINED for label in labels]
    if not any(trained):
        raise InvalidRecord("no token is a target: all labels are -100")
    if not any(trained[1:]):
        raise InvalidRecord("only the first token is a target, and nothing predicts it")
    trained[0] = False
    size = len(trained) - trained[::-1].index(True)
    return [TokenRow(ids[:size], tuple(trained[:size]), origin)]


def read_token_pair(fields: Fields, origin: Origin) -> list[TokenPair]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids`; the answers with their end tokens."""
    prompt, chosen, rejected = (
        _ids(fields, key) for key in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    if chosen == rejected:
        raise InvalidRecord("identical answers")
    return [TokenPair(prompt, chosen, rejected, origin)]


def _ids(fields: Fields, key: str) -> tuple[int, ...]:
    """Return the token ids in `key`; raise `InvalidRecord` when they are none."""
    value = fields.get(key)
    if value is None:
        raise InvalidRecord(f"`{key}` is null or missing")
    # A truth value is an int to Python.
    if not isinstance(value, list) or any(type(one) is not int for one in value):
        raise InvalidRecord(f"`{key}` is not a list of whole numbers")
    if not value:
        raise InvalidRecord(f"empty `{key}`")
    beyond = next((one for one in value if not 0 <= one <= _MOST), None)
    if beyond is not None:
        raise InvalidRecord(f"`{key}` holds an id that no vocabulary has", str(beyond))
    return tuple(value)


def _check_mask(mask: object, size: int) -> None:
    """Raise `InvalidRecord` for an attention mask that hides a token."""
    if mask is None:
        return
    if not isinstance(mask, list) or len(mask) != size:
        raise InvalidRecord("`attention_mask` is not a list as long as `input_ids`")
    if any(type(one) not in (int, bool) or one != 1 for one in mask):
        raise InvalidRecord("`attention_mask` is not all ones: take the padding out of the row")
