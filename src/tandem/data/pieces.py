"""Pieces of data encoded in reading order: here, or in processes where there are many."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

from tandem.data.batch import Batch, Plan, encode_batch
from tandem.data.chunks import Chunk
from tandem.data.encode import Chat
from tandem.data.pool import Pool, available_cores
from tandem.data.worker import Setup

# Shows a phase: its text and total (None: nobody knows) -> told how many more are done.
Show = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]

# Pieces, of up to 256 records each, beyond which worker processes are worth their start: on two
# cores 4000 conversations are quicker without (1.4 s, 1.8 s), 8000 take the same either way.
_FEW = 32
# A worker takes about 140 MB; this many, with the process itself, stay below 2 GB.
_MOST_WORKERS = 12


def encoded_pieces(
    chunks: Iterator[tuple[Chunk, str]],
    chat: Chat | None,
    plan: Plan,
    *,
    doing: str,
    total: Callable[[], int | None],
    show: Show | None,
    workers: int | None,
    limit: int | None = None,
) -> Generator[tuple[Chunk, str, Batch | None]]:
    """Pieces and their formats, each with its batch: None without a tokenizer.

    Args:
        chunks: the pieces, see `reading.formatted_chunks`.
        chat: tokenizer and template.
        plan: what is made of every record.
        doing: in words, for the display.
        total: counts the rows, when there is something to display.
        show: displays the progress of many pieces.
        workers: processes that encode many, one a core when None.
        limit: rows that are surely wanted; more are only read when they are asked for.
    """
    first: list[tuple[Chunk, str]] = []
    for piece in chunks:
        first.append(piece)
        enough = limit is not None and sum(chunk.count for chunk, _ in first) >= limit
        if enough or len(first) > _FEW:
            break
    pieces = chain(first, chunks)
    if len(first) <= _FEW:
        for chunk, known in pieces:
            yield chunk, known, encode_batch(chat, plan, chunk, known) if chat else None
        return
    count = workers or min(available_cores(), _MOST_WORKERS)
    with show(doing, total()) if show else nullcontext(_unseen) as advance:
        if chat is None or chat.parts is None or count == 1:
            for chunk, known in pieces:
                yield chunk, known, encode_batch(chat, plan, chunk, known) if chat else None
                advance(chunk.count)
            return
        with Pool(Setup(chat.parts, plan), count) as pool:
            for (chunk, known), batch in pool.map(pieces):
                yield chunk, known, batch
                advance(chunk.count)


def _unseen(_: int) -> None:
    pass
