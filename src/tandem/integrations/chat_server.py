"""Any OpenAI-compatible server: many requests at a time, retried, paced, the key never shown."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from tandem.errors import Stopped, UserError
from tandem.integrations.chat_request import ChatRequest, Endpoint, Failure, Reply, RetryableError
from tandem.recipe.pairs_settings import ServerSettings

__all__ = ["ChatRequest", "ChatServer", "Failure", "Reply"]

_LONGEST_BACKOFF = 60.0
# A request fails if the server asks for a longer wait.
_LONGEST_WAIT = 600.0


class ChatServer:
    """A model behind an OpenAI-compatible server.

    Args:
        server: where it is, and how fast it may be asked. The key is read from the environment
            here, sent in the header, and removed from everything that a server says.
        backoff: seconds before the first retry at most; doubled with each, and drawn at random
            below that, so that requests that failed together do not come back together.
        patience: so many requests in a row without an answer, tries included, end the run.
        log: called when the server asks for a pause, and at the end with the number of retries.

    Raises UserError for a variable that is not set.
    """

    def __init__(
        self,
        server: ServerSettings,
        *,
        backoff: float = 1.0,
        patience: int = 10,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._endpoint = Endpoint(server)
        self.url, self.model = self._endpoint.url, server.model
        self.retried: Counter[str] = Counter()  # retries of the last requests by reason
        self._counting = threading.Lock()
        self._concurrency, self._retries = server.concurrency, server.retries
        self._backoff, self._patience, self._log = backoff, patience, log
        rate = server.requests_per_minute
        self._pace = _Pace(60.0 / rate if rate else 0.0)

    def __repr__(self) -> str:
        return f"ChatServer({self.url!r}, {self.model!r})"

    def answers(self, requests: Iterable[ChatRequest]) -> Iterator[tuple[int, Reply | Failure]]:
        """Each request's number, counted from 0, and its answer, as they arrive.

        Requests are taken from the iterable as there is room for them. A failure comes after all
        retries, or at once where another try cannot cure it. Closing the iterator ends the rest.

        Raises UserError for what every request would meet (a refused key, a wrong address, the
        first `patience` requests refused), Stopped when as many in a row got no answer.
        """
        self.retried.clear()
        stop = threading.Event()
        todo: queue.SimpleQueue[tuple[int, ChatRequest] | None] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Reply | Failure | BaseException]] = queue.SimpleQueue()
        workers = [
            threading.Thread(target=self._work, args=(todo, done, stop), daemon=True)
            for _ in range(self._concurrency)
        ]
        for worker in workers:
            worker.start()
        waiting, left, silence = 0, enumerate(requests), _Silence(self._patience, self.url)
        try:
            while True:
                while waiting < 2 * self._concurrency and (item := next(left, None)) is not None:
                    todo.put(item)
                    waiting += 1
                if not waiting:
                    return
                number, answer = done.get()
                waiting -= 1
                if isinstance(answer, BaseException):
                    raise answer
                silence.heard(answer)
                yield number, answer
        finally:
            stop.set()
            for _ in workers:
                todo.put(None)
            if self.retried:
                reasons = ", ".join(f"{why}: {n}" for why, n in self.retried.most_common())
                self._log(
                    f"{self.url}: {self.retried.total()} requests were sent again ({reasons})"
                )

    def _work(
        self,
        todo: queue.SimpleQueue[tuple[int, ChatRequest] | None],
        done: queue.SimpleQueue[tuple[int, Reply | Failure | BaseException]],
        stop: threading.Event,
    ) -> None:
        while (item := todo.get()) is not None and not stop.is_set():
            number, request = item
            try:
                done.put((number, self._patiently(request, stop)))
            except BaseException as error:  # raised again where the answers are waited for
                done.put((number, error))

    def _patiently(self, request: ChatRequest, stop: threading.Event) -> Reply | Failure:
        draw = random.Random()
        for attempt in range(self._retries + 1):
            self._pace.wait(stop)
            try:
                return self._endpoint.ask(request)
            except RetryableError as trouble:
                last = trouble
            if attempt == self._retries or stop.is_set():
                break
            if last.wait is not None:
                if last.wait > _LONGEST_WAIT:
                    detail = f"asks to wait {last.wait:.0f} s: {last.detail}"
                    return Failure(last.reason, detail, may_pass=True)
                if self._pace.hold(last.wait) and last.wait >= 1:
                    self._log(f"{self.url}: {last.reason}, waiting {last.wait:.0f} s")
            else:
                most = min(self._backoff * 2**attempt, _LONGEST_BACKOFF)
                stop.wait(draw.uniform(most / 2, most))
            with self._counting:
                self.retried[last.reason] += 1
        tries = f"after {self._retries + 1} tries: " if self._retries else ""
        return Failure(last.reason, tries + last.detail, may_pass=True)


def first_answer(server: ServerSettings, request: ChatRequest, key: str) -> Reply | None:
    """Ask a server one question before a run depends on it; None where it only asks for patience.

    `key` is the recipe's key of the server, for messages. An answer is waited for as for any other
    request, with one more try.

    Raises UserError for a server that cannot be reached, refuses the question, or does not answer.
    """
    once = server.model_copy(update={"retries": min(server.retries, 1), "concurrency": 1})
    client = ChatServer(once)
    ((_, answer),) = client.answers([request])
    if isinstance(answer, Reply):
        return answer
    if answer.reason == "HTTP 429":
        return None
    raise UserError(
        f"{key}: {client.url} does not answer as {server.model!r} ({answer}). It was asked one "
        f"question, because the run depends on it later. Start the server or correct {key}, then "
        "give the same command again; stages that need no server can be run before (--until)."
    )


class _Silence:
    """Notices a server that no longer answers, or refuses everything."""

    def __init__(self, patience: int, url: str) -> None:
        self._patience, self._url = patience, url
        self._unanswered = self._refused = 0
        self._answered = False

    def heard(self, answer: Reply | Failure) -> None:
        """Count one result; raises what ends the run."""
        if isinstance(answer, Reply):
            self._answered, self._unanswered = True, 0
            return
        if answer.reason.startswith("HTTP 4") and answer.reason != "HTTP 429":
            self._refused += 1
            if not self._answered and self._refused >= self._patience:
                raise UserError(
                    f"{self._url} refused the first {self._refused} requests ({answer}). Check the "
                    "model's name and the settings that are sent."
                )
            return
        self._unanswered += 1
        if self._unanswered >= self._patience:
            raise Stopped(
                f"{self._url} left {self._unanswered} requests in a row unanswered ({answer}). "
                "Earlier answers are kept; the same command resumes after them."
            )


class _Pace:
    """When the next request may begin: not too often, and not before the server wants it."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._lock = threading.Lock()
        self._next = self._open = 0.0

    def wait(self, stop: threading.Event) -> None:
        """Take the next turn, and wait for it."""
        with self._lock:
            turn = self._next = max(time.monotonic(), self._next)
            self._next += self._interval
        while not stop.is_set():
            with self._lock:
                left = max(turn, self._open) - time.monotonic()
            if left <= 0:
                return
            stop.wait(left)

    def hold(self, seconds: float) -> bool:
        """Let no request begin for so long; return whether that is longer than before."""
        until = time.monotonic() + seconds
        with self._lock:
            news = until > self._open + 1
            self._open = max(self._open, until)
        return news
