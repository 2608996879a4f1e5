"""The way of data from its sources to encoded records, every loss on the way accounted for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.encoded.dataset_store import DatasetWriter, EncodedStore, encoding_key, replay
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.encoded.worker_pool import Show, encoded_pieces
from tandem.data.ledger import Ledger
from tandem.data.read_records import OnBadRecord, formatted_chunks, names_of
from tandem.data.sources.chunks import Chunk
from tandem.data.sources.rows import count_sources, origin_names
from tandem.data.tokenize.chat_template import ChatTemplate
from tandem.data.tokenize.encode import ChatTokenizer, LossOn
from tandem.data.tokenize.template_omissions import way_out
from tandem.data.truncation.limits import Limits, TooLong
from tandem.errors import UserError

if TYPE_CHECKING:
    from tandem.recipe.data_source import DataSource


def prepare_conversations(
    sources: Sequence[DataSource],
    *,
    tokenizer: Any,
    template: ChatTemplate,
    max_length: int,
    max_prompt_length: int | None = None,
    too_long: TooLong = "drop_old_turns",
    on_bad_record: OnBadRecord = "stop",
    ledger: Ledger,
    store: EncodedStore | None = None,
    show: Show | None = None,
    workers: int | None = None,
    loss_on: LossOn = "answers",
    limit: int | None = None,
    rows: int | None = None,
) -> EncodedDataset:
    """Read, encode and fit conversations: one tree a record, in reading order.

    `max_length` and `max_prompt_length` are tokens; a conversation within `max_length` is never
    cut, and `too_long` says what others lose (see `truncate`). `loss_on` is what is trained: the
    answers or every token of the text. With a `store` the result is found there or kept there,
    otherwise it is held in memory.
    `show` displays the progress of large data; `workers` processes encode it, one a core (but no
    more than 12) when None. With a `limit` only the first so many trees are made, in memory, and
    what lies behind their pieces of a source is not read. `rows` are those of the model's
    embedding, None: enough for every token. Raises `UserError` for sources, lines or templates that
    cannot be used, for a record with a token beyond the rows, and when no record is left.
    """
    limits = Limits(max_length, max_prompt_length, too_long)
    plan = EncodingOptions("conversations", limits, on_bad_record, loss_on)
    way = _Way(
        sources, ChatTokenizer.of(tokenizer, template, rows), plan, ledger, show, workers, limit
    )
    return _prepare(way, store)


def prepare_pairs(
    sources: Sequence[DataSource],
    *,
    tokenizer: Any,
    template: ChatTemplate,
    max_length: int,
    max_prompt_length: int | None = None,
    too_long: TooLong = "drop_old_turns",
    on_bad_record: OnBadRecord = "stop",
    ledger: Ledger,
    store: EncodedStore | None = None,
    show: Show | None = None,
    workers: int | None = None,
    limit: int | None = None,
    rows: int | None = None,
) -> EncodedDataset:
    """Read, encode and fit preference pairs: one tree a record, in reading order.

    `max_length` (prompt and one answer) and `max_prompt_length` are tokens. The rest is as in
    `prepare_conversations`.
    """
    limits = Limits(max_length, max_prompt_length, too_long)
    plan = EncodingOptions("preference pairs", limits, on_bad_record)
    way = _Way(
        sources, ChatTokenizer.of(tokenizer, template, rows), plan, ledger, show, workers, limit
    )
    return _prepare(way, store)


@dataclass(frozen=True)
class _Way:
    """What one preparation was asked for."""

    sources: Sequence[DataSource]
    chat: ChatTokenizer
    plan: EncodingOptions
    ledger: Ledger
    show: Show | None
    workers: int | None
    limit: int | None


def _prepare(way: _Way, store: EncodedStore | None) -> EncodedDataset:
    if store is None or way.limit is not None:
        return _in_memory(way)
    parts = way.chat.parts
    key = None if parts is None else encoding_key(way.sources, parts, way.plan)
    if key is None:
        store.log("this data or tokenizer cannot be told by content: it is encoded at every start")
        return _in_memory(way)
    names = origin_names(way.sources)
    found = store.find(key, names)
    if found is not None:
        replay(found, way.ledger, [source.path for source in way.sources])
        return found.dataset
    try:
        with store.writing(key, names) as writer:
            ledger = _fill(way, writer)
            if parts is not None and encoding_key(way.sources, parts, way.plan) != key:
                raise UserError(
                    f"data: {names_of(way.sources)} changed while it was being read. Start again "
                    "when nothing writes to it."
                )
        dataset = store.dataset(key, names)
        store.prune(key)
    except OSError as error:
        store.log(f"the encoded data cannot be kept ({error}): it is encoded at every start")
        return _in_memory(way)
    _tell(way.ledger, ledger)
    return dataset


def _in_memory(way: _Way) -> EncodedDataset:
    writer = DatasetWriter(None, origin_names(way.sources))
    _tell(way.ledger, _fill(way, writer))
    dataset = writer.dataset()
    return dataset if way.limit is None else dataset.select(np.arange(min(way.limit, len(dataset))))


def _fill(way: _Way, writer: DatasetWriter) -> Ledger:
    """Encode everything into `writer`; the ledger returned has what became of each record."""
    ledger = Ledger(None)
    owners: deque[int] = deque()  # the source of each piece that has no batch yet
    records = [0] * len(way.sources)

    def chunks() -> Iterator[tuple[Chunk, str]]:
        for number, source in enumerate(way.sources):
            for chunk in formatted_chunks([source], way.plan.kind, ledger, way.plan.on_bad_record):
                owners.append(number)
                yield chunk

    with closing(
        encoded_pieces(
            chunks(),
            way.chat,
            way.plan,
            doing="encoding records",
            total=partial(count_sources, way.sources),
            show=way.show,
            workers=way.workers,
            limit=way.limit,
        )
    ) as pieces:
        for _, _, batch in pieces:
            assert batch is not None
            room = None if way.limit is None else way.limit - writer.records
            writer.add(batch)
            count = len(batch.arrays.parts)
            records[owners.popleft()] += count
            if room is not None and room <= count:
                last = int(batch.arrays.rows[room - 1])
                ledger.add([entry for entry in batch.entries if entry.row <= last], room)
                break
            ledger.add(batch.entries, count)
    if not writer.records:
        raise nothing_left(way.sources, ledger)
    paths = [source.path for source in way.sources]
    formats = {n: ledger.formats[path] for n, path in enumerate(paths) if path in ledger.formats}
    unread = {n: ledger.unread[path] for n, path in enumerate(paths) if path in ledger.unread}
    writer.finish(formats, records, unread)
    return ledger


def _tell(ledger: Ledger, more: Ledger) -> None:
    for source, name in more.formats.items():
        ledger.detected(source, name, more.unread.get(source, ()))
    ledger.add(more.entries, more.counts["trained"])


def nothing_left(sources: Sequence[DataSource], ledger: Ledger) -> UserError:
    """What to say when no record of some sources can be trained."""
    reasons = "; ".join(f"{reason}: {n}" for reason, n in ledger.summary()["reasons"].items())
    return UserError(
        f"data: none of the {ledger.counts['read']} records of {names_of(sources)} can be "
        f"trained ({reasons}). {_example(ledger)}"
    )


def _example(ledger: Ledger) -> str:
    """What was wrong with the first record that was dropped."""
    entry = next((entry for entry in ledger.entries if entry.outcome == "dropped"), None)
    if entry is None:
        return ""
    why = f"{entry.reason} ({entry.detail})" if entry.detail else entry.reason
    return f"The first, {entry.file}, row {entry.row}: {why}. {way_out(entry.reason)}"
