"""One piece of a data set from its rows to encoded trees and ledger lines, in any process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from tandem.data.chunks import Chunk
from tandem.data.columns import Columns, to_columns
from tandem.data.encode import (
    Chat,
    Encoded,
    Exchange,
    Refused,
    conversation_tree,
    encode_exchanges,
    pair_tree,
)
from tandem.data.formats import Kind
from tandem.data.ledger import Entry
from tandem.data.reading import OnBadRecord, records_of
from tandem.data.records import Conversation, PreferencePair, Tree, prompt_key
from tandem.data.truncate import Fitted, Limits, fit_conversation, fit_pair, trained_exchanges


@dataclass(frozen=True, slots=True)
class Plan:
    """What is made of every record, apart from tokenizer and template."""

    kind: Kind
    limits: Limits
    on_bad_record: OnBadRecord


@dataclass(frozen=True, slots=True)
class Batch:
    """A piece's trees, and an entry for each record that was cut or dropped, by row."""

    file: str
    columns: Columns
    entries: tuple[Entry, ...]


def encode_batch(chat: Chat, plan: Plan, chunk: Chunk, known: str) -> Batch:
    """Read, encode and fit the records of a piece, in the format named `known`.

    Raises `UserError` for rows or turns that stop a run.
    """
    found = list(records_of(chunk, known, plan.on_bad_record))
    entries = [one for one in found if isinstance(one, Entry)]
    records = [one for one in found if not isinstance(one, Entry)]
    exchanges = [_exchanges(record) for record in records]
    encoded = iter(encode_exchanges(chat, [one for some in exchanges for one in some]))
    trees, prompts = [], []
    for record, own in zip(records, exchanges, strict=True):
        fitted = _fit(chat, record, list(islice(encoded, len(own))), plan.limits)
        if isinstance(fitted, Refused):
            entries.append(Entry.dropped(record.origin, fitted.reason, fitted.detail))
            continue
        if fitted.reason:
            entries.append(Entry.truncated(record.origin, fitted.reason, fitted.detail))
        trees.append(_tree(record, fitted.encoded))
        prompts.append(prompt_key(record))
    entries.sort(key=lambda entry: entry.row)
    return Batch(chunk.file, to_columns(trees, prompts), tuple(entries))


def _exchanges(record: Conversation | PreferencePair) -> list[Exchange]:
    if isinstance(record, Conversation):
        return trained_exchanges(record)
    answers = (record.chosen, record.rejected)
    return [Exchange(record.prompt, text, record.origin) for text in answers]


def _fit(
    chat: Chat,
    record: Conversation | PreferencePair,
    encoded: Sequence[Encoded | Refused],
    limits: Limits,
) -> Fitted | Refused:
    if isinstance(record, Conversation):
        return fit_conversation(chat, record, encoded, limits)
    return fit_pair(chat, record, encoded, limits)


def _tree(record: Conversation | PreferencePair, encoded: Sequence[Encoded]) -> Tree:
    if isinstance(record, Conversation):
        return conversation_tree(encoded, record.origin)
    return pair_tree(encoded[0], encoded[1], record.origin)
