"""Worker processes that encode or inspect chunks of a data set, with results in reading order.

They are fresh interpreters, because a process with torch's threads must not fork, and spawning
would import the main module again. Each runs `main`, which reads tasks from its standard input and
writes results to its standard output. Nothing here imports torch.
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
from functools import partial
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Generic, Protocol, Self, TypeVar

import tandem
from tandem.data.encoded.dataset_store import EncodedStore
from tandem.data.encoded.encode_chunk import EncodedChunk, EncodingOptions, encode_chunk
from tandem.data.sources.chunks import Chunk
from tandem.data.tokenize.codec import CodecParts
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.errors import TandemError, UserError

# Chunks between two garbage collections: jinja's and the JSON parser's objects are many and
# short-lived, and collecting all the time takes a tenth longer.
_COLLECT_EVERY = 64


Result = TypeVar("Result")
Made = TypeVar("Made", covariant=True)
Answer = Callable[[Chunk, str], Result]  # what is done with a chunk in the format with an id


class Setup(Protocol[Made]):
    """The first message to a worker: plain values, which all its tasks have in common."""

    def ready(self) -> Answer[Made]:
        """Return what answers each task."""


@dataclass(frozen=True, slots=True)
class EncodingSetup:
    """The setup of workers that encode chunks."""

    parts: CodecParts
    options: EncodingOptions

    def ready(self) -> Answer[EncodedChunk]:
        return partial(encode_chunk, ChatTokenizer.from_parts(self.parts), self.options)


@dataclass(frozen=True, slots=True)
class ChunkWork(Generic[Result]):
    """What is done with each chunk: `here` in this process, or in workers with this `setup`.

    Without a setup, no other process can do it.
    """

    here: Answer[Result]
    setup: Setup[Result] | None


@dataclass(frozen=True, slots=True)
class Bug:
    """The traceback of an error that is no fault of the data."""

    trace: str


def send(stream: IO[bytes], message: Any) -> None:
    """Write one message: its length, then its pickle."""
    content = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("<Q", len(content)))
    stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one message; raise EOFError when the other side is gone."""
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return pickle.loads(content)


def main() -> None:
    """Answer each task with its result, a `UserError` or a `Bug`."""
    tasks, results = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library's print must not get between the messages
    gc.disable()
    try:
        setup: Setup[Any] = receive(tasks)
        answer_to = setup.ready()
        for number in range(sys.maxsize):
            chunk, known = receive(tasks)
            try:
                answer: Any = answer_to(chunk, known)
            except UserError as error:
                answer = error
            except Exception:
                answer = Bug(traceback.format_exc())
            send(results, answer)
            if number % _COLLECT_EVERY == 0:
                gc.collect()
    except (EOFError, BrokenPipeError):
        pass  # the process that wanted the results is done, or gone


# Chunks in flight for each worker: one in work, one waiting, one done.
_AHEAD = 3
Task = tuple[Chunk, str]


def available_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Pool(Generic[Result]):
    """A context manager of `count` worker processes; they end with it, whatever happens."""

    def __init__(self, setup: Setup[Result], count: int) -> None:
        self._setup = setup
        self._count = count
        self._workers: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        # A thread for each worker, which sends a chunk and waits for its result.
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

    def __exit__(self, *_: object) -> None:
        self._end()

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result, in order; only a few are in flight at once.

        Raises the error of the first task that fails, even if reading a later task failed earlier.
        """
        waiting: deque[tuple[Task, Future[Result]]] = deque()
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
                    waiting.append((task, self._threads.submit(self._done, task)))
            if waiting:
                task, answer = waiting.popleft()
                yield task, answer.result()
        if failed is not None:
            raise failed

    def _done(self, task: Task) -> Result:
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
        result: Result = answer
        return result

    def _end(self) -> None:
        # Killed first, so that the threads that wait for them get an end of file.
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
    paths = os.environ.get("PYTHONPATH")
    return subprocess.Popen(
        [sys.executable, "-P", "-c", "from tandem.data.encoded.worker_pool import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([package, paths] if paths else [package]),
            # Each worker has one core.
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        # Ctrl-C goes only to the main process, which ends the workers.
        start_new_session=True,
    )


# Displays a phase with a text and a total, if that is known; yields the function to advance it.
ShowProgress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]

# Chunks, of up to 256 records each, beyond which worker processes are worth their start: on two
# cores 4000 conversations are faster without (1.4 s, 1.8 s), 8000 take the same either way.
_FEW = 32
# A worker takes about 140 MB; this many, with the process itself, stay below 2 GB.
_MOST_WORKERS = 12


@dataclass(frozen=True, slots=True)
class EncodingWork:
    """Where encoded data is kept, who encodes it, and how much of it is needed."""

    store: EncodedStore | None = None  # finds and keeps the result; without one it stays in memory
    # processes that encode large data; None: one a core, but no more than 12
    workers: int | None = None
    progress: ShowProgress | None = None  # displays the progress of large data
    limit: int | None = None  # make only so many examples, in memory; later chunks are not read


def encoded_chunks(
    chunks: Iterator[tuple[Chunk, str]],
    chat: ChatTokenizer,
    options: EncodingOptions,
    doing: str,
    total: Callable[[], int | None],
    work: EncodingWork,
) -> Generator[tuple[Chunk, str, EncodedChunk]]:
    """Yield chunks and their formats, each with its encoded chunk; see `worked_chunks`."""
    setup = None if chat.parts is None else EncodingSetup(chat.parts, options)
    encoding = ChunkWork(partial(encode_chunk, chat, options), setup)
    yield from worked_chunks(chunks, encoding, doing, total, work)


def worked_chunks(
    chunks: Iterator[tuple[Chunk, str]],
    job: ChunkWork[Result],
    doing: str,
    total: Callable[[], int | None],
    work: EncodingWork,
) -> Generator[tuple[Chunk, str, Result]]:
    """Yield chunks and their formats, each with its result; large data is done by workers.

    Args:
        chunks: see `read_records.formatted_chunks`.
        job: what is done with each.
        doing: what the display says.
        total: counts the rows for the display.
        work: who does it; up to its limit, rows are read ahead.
    """
    first: list[tuple[Chunk, str]] = []
    for one in chunks:
        first.append(one)
        enough = work.limit is not None and sum(c.count for c, _ in first) >= work.limit
        if enough or len(first) > _FEW:
            break
    tasks = chain(first, chunks)
    many = len(first) > _FEW
    count = work.workers or min(available_cores(), _MOST_WORKERS)
    shown = work.progress(doing, total()) if many and work.progress else None
    with shown or nullcontext(lambda _: None) as advance:
        if not many or job.setup is None or count == 1:
            for chunk, known in tasks:
                yield chunk, known, job.here(chunk, known)
                advance(chunk.count)
            return
        with Pool(job.setup, count) as pool:
            for (chunk, known), result in pool.map(tasks):
                yield chunk, known, result
                advance(chunk.count)
