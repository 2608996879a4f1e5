"""The way of data from its sources to encoded records, every loss on the way accounted for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.encoded.dataset_store import DatasetWriter, encoding_key
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.encoded.worker_pool import EncodingWork, encoded_chunks
from tandem.data.ledger import Ledger
from tandem.data.read_records import formatted_chunks, names_of
from tandem.data.sources.chunks import Chunk
from tandem.data.sources.rows import count_sources, origin_names
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.tokenize.template_omissions import way_out
from tandem.errors import UserError

if TYPE_CHECKING:
    from tandem.recipe.data_source import DataSource


def build_dataset(
    sources: Sequence[DataSource],
    chat: ChatTokenizer,
    options: EncodingOptions,
    ledger: Ledger,
    work: EncodingWork | None = None,
) -> EncodedDataset:
    """Read, encode and fit the records of some sources: one example a record, in reading order.

    A document has as many as it has pieces.

    `ledger` records what became of each. Raises `UserError` for sources, lines or templates that
    cannot be used, for a token that the model has no row for, and when no record is left.
    """
    builder = _Builder(sources, chat, options, work or EncodingWork())
    dataset, own = builder.build()
    for path, name in own.formats.items():
        ledger.detected(path, name, own.unread.get(path, ()))
    ledger.add(own.entries, own.counts["trained"])
    return dataset


@dataclass(frozen=True)
class _Builder:
    sources: Sequence[DataSource]
    chat: ChatTokenizer
    options: EncodingOptions
    work: EncodingWork

    def build(self) -> tuple[EncodedDataset, Ledger]:
        """Return the dataset, from the store or newly made, with what became of each record."""
        store, parts = self.work.store, self.chat.parts
        if store is None or self.work.limit is not None:
            return self._in_memory()
        key = None if parts is None else encoding_key(self.sources, parts, self.options)
        if key is None:
            store.log("this data or tokenizer has no content hash: it is encoded at every start")
            return self._in_memory()
        names = origin_names(self.sources)
        kept = store.find(key, names)
        if kept is not None:
            return kept.dataset, kept.ledger([source.path for source in self.sources])
        try:
            with store.writing(key, names) as writer:
                ledger = self._fill(writer)
                if parts is not None and encoding_key(self.sources, parts, self.options) != key:
                    raise UserError(
                        f"data: {names_of(self.sources)} changed while it was being read. Start "
                        "again when nothing writes to it."
                    )
            dataset = store.dataset(key, names)
            store.prune(key)
        except OSError as error:
            store.log(f"the encoded data cannot be kept ({error}): it is encoded at every start")
            return self._in_memory()
        return dataset, ledger

    def _in_memory(self) -> tuple[EncodedDataset, Ledger]:
        writer = DatasetWriter(None, origin_names(self.sources))
        ledger, limit = self._fill(writer), self.work.limit
        dataset = writer.dataset()
        if limit is not None:
            dataset = dataset.select(np.arange(min(limit, len(dataset))))
        return dataset, ledger

    def _fill(self, writer: DatasetWriter) -> Ledger:
        """Encode everything into `writer`; the ledger returned has what became of each record."""
        ledger, limit = Ledger(None), self.work.limit
        owners: deque[int] = deque()  # the source of each chunk that is not encoded yet
        records = [0] * len(self.sources)
        kind, on_bad_record = self.options.kind, self.options.on_bad_record

        def chunks() -> Iterator[tuple[Chunk, str]]:
            for number, source in enumerate(self.sources):
                for chunk in formatted_chunks([source], kind, ledger, on_bad_record):
                    owners.append(number)
                    yield chunk

        total = partial(count_sources, self.sources)
        encoding = encoded_chunks(
            chunks(), self.chat, self.options, "encoding records", total, self.work
        )
        with closing(encoding):
            for _, _, encoded in encoding:
                room = None if limit is None else limit - writer.records
                writer.add(encoded)
                count = len(encoded.arrays.parts)
                records[owners.popleft()] += count
                if room is not None and room <= count:
                    last = int(encoded.arrays.rows[room - 1])
                    entries = [entry for entry in encoded.entries if entry.row <= last]
                    ledger.add(entries, encoded.records(room))
                    break
                ledger.add(encoded.entries, encoded.trained)
        if not writer.records:
            raise nothing_left(self.sources, ledger)
        paths = list(enumerate(source.path for source in self.sources))
        formats = {n: ledger.formats[path] for n, path in paths if path in ledger.formats}
        unread = {n: ledger.unread[path] for n, path in paths if path in ledger.unread}
        writer.finish(formats, records, unread)
        return ledger


def nothing_left(sources: Sequence[DataSource], ledger: Ledger) -> UserError:
    """Return the error that no record of some sources can be trained, with the first reason."""
    reasons = "; ".join(f"{reason}: {n}" for reason, n in ledger.summary()["reasons"].items())
    first = ""
    if entry := next((entry for entry in ledger.entries if entry.outcome == "dropped"), None):
        why = f"{entry.reason} ({entry.detail})" if entry.detail else entry.reason
        first = f"The first, {entry.file}, row {entry.row}: {why}. {way_out(entry.reason)}"
    return UserError(
        f"data: none of the {ledger.counts['read']} records of {names_of(sources)} can be "
        f"trained ({reasons}). {first}"
    )
