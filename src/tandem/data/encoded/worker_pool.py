"""Worker processes that encode chunks of a data set, their results in reading order.

They are fresh interpreters rather than forks: a process with torch's threads must not fork, and one
whose main module would be imported anew must not spawn. Each runs `main`, which reads tasks from
its standard input and writes results to its standard output. Nothing here imports torch.
"""

from __future__ import annotations

import gc
import os
import pickle
import struct
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Any, Self

import tandem
from tandem.data.encoded.dataset_store import EncodedStore
from tandem.data.encoded.encode_chunk import EncodedChunk, EncodingOptions, encode_chunk
from tandem.data.sources.chunks import Chunk
from tandem.data.tokenize.codec import CodecParts
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.errors import TandemError, UserError

# Batches between two looks for cyclic garbage: jinja's and the JSON parser's objects are many and
# short-lived, and searching them all the time costs a tenth.
_COLLECT_EVERY = 64


@dataclass(frozen=True, slots=True)
class Setup:
    """The first message: what all tasks have in common."""

    parts: CodecParts
    options: EncodingOptions


@dataclass(frozen=True, slots=True)
class Bug:
    """An error that is nobody's data's fault, as text."""

    trace: str


def send(stream: IO[bytes], message: Any) -> None:
    """Write one message: its length, then its pickle."""
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("<Q", len(content)))
    stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one message; raises EOFError when the other side is gone."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return pickle.loads(content)


def main() -> None:
    """Answer each task with its batch, a `UserError` or a `Bug`."""
    tasks, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the messages
    gc.disable()
    try:
        setup: Setup = receive(tasks)
        chat = ChatTokenizer.from_parts(setup.parts)
        for number in range(sys.maxsize):
            chunk, known = receive(tasks)
            try:
                answer: Any = encode_chunk(chat, setup.options, chunk, known)
            except UserError as error:
                answer = error
            except Exception:
                answer = Bug(traceback.format_exc())
            send(results, answer)
            if number % _COLLECT_EVERY == 0:
                gc.collect()
    except (EOFError, BrokenPipeError):
        pass  # the process that wanted the results is done, or gone


# Chunks on their way for each worker: one in work, one waiting, one done.
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
        # A thread for each worker: it hands over a chunk and waits for its result.
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
        [sys.executable, "-P", "-c", "from tandem.data.encoded.worker_pool import main; main()"],
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


# Displays a phase with a text and a total, if that is known; what it yields is told of progress.
ShowProgress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]

# Chunks, of up to 256 records each, beyond which worker processes are worth their start: on two
# cores 4000 conversations are quicker without (1.4 s, 1.8 s), 8000 take the same either way.
_FEW = 32
# A worker takes about 140 MB; this many, with the process itself, stay below 2 GB.
_MOST_WORKERS = 12


@dataclass(frozen=True, slots=True)
class EncodingWork:
    """Where encoded data is kept, who encodes it, and how much of it is wanted.

    Attributes:
        store: finds and keeps the result; without one it is held in memory.
        workers: processes that encode large data; None: one a core, but no more than 12.
        progress: displays the progress of large data.
        limit: only so many examples are made, in memory; chunks behind them are not read.
    """

    store: EncodedStore | None = None
    workers: int | None = None
    progress: ShowProgress | None = None
    limit: int | None = None


def encoded_chunks(
    chunks: Iterator[tuple[Chunk, str]],
    chat: ChatTokenizer | None,
    options: EncodingOptions,
    doing: str,
    total: Callable[[], int | None],
    work: EncodingWork,
) -> Generator[tuple[Chunk, str, EncodedChunk | None]]:
    """Chunks and their formats, each with what encoding makes of it: None without a tokenizer.

    Args:
        chunks: see `read_records.formatted_chunks`.
        chat: tokenizer and template.
        options: what is made of every record.
        doing: in words, for the display.
        total: counts the rows, when there is something to display.
        work: who encodes; beyond its limit, rows are read only when they are asked for.
    """
    first: list[tuple[Chunk, str]] = []
    for one in chunks:
        first.append(one)
        enough = work.limit is not None and sum(c.count for c, _ in first) >= work.limit
        if enough or len(first) > _FEW:
            break
    tasks = chain(first, chunks)
    if len(first) <= _FEW:
        for chunk, known in tasks:
            yield chunk, known, encode_chunk(chat, options, chunk, known) if chat else None
        return
    count = work.workers or min(available_cores(), _MOST_WORKERS)
    showing = work.progress(doing, total()) if work.progress else nullcontext(lambda _: None)
    with showing as advance:
        if chat is None or chat.parts is None or count == 1:
            for chunk, known in tasks:
                yield chunk, known, encode_chunk(chat, options, chunk, known) if chat else None
                advance(chunk.count)
            return
        with Pool(Setup(chat.parts, options), count) as pool:
            for (chunk, known), encoded in pool.map(tasks):
                yield chunk, known, encoded
                advance(chunk.count)
