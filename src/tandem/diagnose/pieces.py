"""A data set in pieces, each with what encoding makes of it: by processes where it is large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice

from tandem.data.batch import Batch, Plan, encode_batch
from tandem.data.chunks import BadLine, Chunk, Row, RowChunk
from tandem.data.encode import Chat
from tandem.data.ledger import Ledger
from tandem.data.pool import Pool, available_cores
from tandem.data.reading import formatted_chunks
from tandem.data.sources import SourceSpec, count_source
from tandem.data.worker import Setup

# Shows a phase: its text and total (None: nobody knows) -> told how many more are done.
Show = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]

# Pieces, of up to 256 records each, beyond which progress is shown and processes encode.
_FEW = 32
_MOST_WORKERS = 12


def encoded_pieces(
    sources: Sequence[SourceSpec],
    plan: Plan,
    chat: Chat | None,
    ledger: Ledger,
    *,
    limit: int | None,
    show: Show | None,
    workers: int | None,
) -> Iterator[tuple[Chunk, str, Batch | None]]:
    """The pieces of the data, each with its format and, where there is a tokenizer, its trees.

    Args:
        sources: the data.
        plan: what is made of every record.
        chat: tokenizer and template; without one nothing is encoded.
        ledger: told the formats.
        limit: rows after which to stop.
        show: displays the progress of large data.
        workers: processes that encode large data, one a core when None.
    """
    chunks = formatted_chunks(sources, plan.kind, ledger, plan.on_bad_record)
    if limit is not None:
        chunks = _limited(chunks, limit)
    first = list(islice(chunks, _FEW + 1))
    pieces = chain(first, chunks)
    if len(first) <= _FEW:
        for chunk, known in pieces:
            yield chunk, known, encode_batch(chat, plan, chunk, known) if chat else None
        return
    with show("checking records", _total(sources, limit)) if show else nullcontext(_unseen) as tell:
        count = workers or min(available_cores(), _MOST_WORKERS)
        if chat is None or chat.parts is None or count == 1:
            for chunk, known in pieces:
                yield chunk, known, encode_batch(chat, plan, chunk, known) if chat else None
                tell(chunk.count)
            return
        with Pool(Setup(chat.parts, plan), count) as pool:
            for (chunk, known), batch in pool.map(pieces):
                yield chunk, known, batch
                tell(chunk.count)


def _total(sources: Sequence[SourceSpec], limit: int | None) -> int | None:
    counts = [count_source(source) for source in sources]
    total = None if None in counts else sum(count or 0 for count in counts)
    return total if limit is None or total is None else min(limit, total)


def _limited(chunks: Iterator[tuple[Chunk, str]], limit: int) -> Iterator[tuple[Chunk, str]]:
    """The pieces up to row `limit`."""
    for chunk, known in chunks:
        if chunk.count >= limit:
            rows: tuple[Row | BadLine, ...] = tuple(islice(chunk.rows(), limit))
            yield RowChunk(chunk.file, len(rows), rows), known
            return
        limit -= chunk.count
        yield chunk, known


def _unseen(_: int) -> None:
    pass
