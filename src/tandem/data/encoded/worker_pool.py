"""Worker processes that encode pieces of a data set, their results in reading order.

They are fresh interpreters rather than forks: a process with torch's threads must not fork, and one
whose main module would be imported anew must not spawn.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Self

import tandem
from tandem.data.encoded.encode_chunk import EncodedChunk, EncodingOptions, encode_chunk
from tandem.data.encoded.encode_worker import Bug, Setup, receive, send
from tandem.data.sources.chunks import Chunk
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.errors import TandemError, UserError

# Pieces on their way for each worker: one in work, one waiting, one done.
_AHEAD = 3
Task = tuple[Chunk, str]


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Pool:
    """`count` worker processes, as a context manager; they end with it, whatever happens."""

    def __init__(self, setup: Setup, count: int) -> None:
        self._setup = setup
        self._count = count
        self._workers: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        # A thread for each worker: it hands over a piece and waits for its result.
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="encode")

    def __enter__(self) -> Self:
        try:
            for _ in range(self._count):
                worker = _start()
                self._workers.append(worker)
                self._idle.put(worker)
            for worker in self._workers:
                assert worker.stdin is not None
                send(worker.stdin, self._setup)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, EncodedChunk]]:
        """Each task with its batch, in order; no more than a few are on their way at once.

        Raises what a worker raised for the first task that fails, also when reading the next
        tasks failed before that.
        """
        waiting: deque[tuple[Task, Future[EncodedChunk]]] = deque()
        source = iter(tasks)
        failed: UserError | None = None
        more = True
        while more or waiting:
            while more and len(waiting) < self._count * _AHEAD:
                try:
                    task = next(source)
                except StopIteration:
                    more = False
                except UserError as error:
                    failed, more = error, False
                else:
                    waiting.append((task, self._threads.submit(self._encode, task)))
            if waiting:
                task, batch = waiting.popleft()
                yield task, batch.result()
        if failed is not None:
            raise failed

    def _encode(self, task: Task) -> EncodedChunk:
        worker = self._idle.get()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            send(worker.stdin, task)
            answer = receive(worker.stdout)
        except (EOFError, OSError) as error:
            raise TandemError(
                f"a process that encoded records ended by itself (exit code {worker.wait()}). If "
                "it was killed, memory may have run out: free some, or give fewer cores."
            ) from error
        finally:
            self._idle.put(worker)
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, Bug):
            raise RuntimeError(f"in a process that encodes records:\n{answer.trace}")
        assert isinstance(answer, EncodedChunk)
        return answer

    def _end(self) -> None:
        # Killed first: the threads that wait for them then get an end of file.
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):  # half a message to a worker that is gone
                    pipe.close()


def _start() -> subprocess.Popen[bytes]:
    package = str(Path(tandem.__file__).resolve().parents[1])
    found = os.environ.get("PYTHONPATH")
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from tandem.data.encoded.encode_worker import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([package, found] if found else [package]),
            # Each worker is one core's.
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        # Ctrl-C goes to the process that knows what to do about it, and that ends these.
        start_new_session=True,
    )


# Shows a phase: its text and total (None: nobody knows) -> told how many more are done.
Show = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]

# Pieces, of up to 256 records each, beyond which worker processes are worth their start: on two
# cores 4000 conversations are quicker without (1.4 s, 1.8 s), 8000 take the same either way.
_FEW = 32
# A worker takes about 140 MB; this many, with the process itself, stay below 2 GB.
_MOST_WORKERS = 12


def encoded_pieces(
    chunks: Iterator[tuple[Chunk, str]],
    chat: ChatTokenizer | None,
    plan: EncodingOptions,
    *,
    doing: str,
    total: Callable[[], int | None],
    show: Show | None,
    workers: int | None,
    limit: int | None = None,
) -> Generator[tuple[Chunk, str, EncodedChunk | None]]:
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
            yield chunk, known, encode_chunk(chat, plan, chunk, known) if chat else None
        return
    count = workers or min(available_cores(), _MOST_WORKERS)
    with show(doing, total()) if show else nullcontext(_unseen) as advance:
        if chat is None or chat.parts is None or count == 1:
            for chunk, known in pieces:
                yield chunk, known, encode_chunk(chat, plan, chunk, known) if chat else None
                advance(chunk.count)
            return
        with Pool(Setup(chat.parts, plan), count) as pool:
            for (chunk, known), batch in pool.map(pieces):
                yield chunk, known, batch
                advance(chunk.count)


def _unseen(_: int) -> None:
    pass
