"""Any OpenAI-compatible server: many requests at a time, retried, paced, the key never shown."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from tandem.errors import Stopped, UserError
from tandem.integrations.chat_request import ChatRequest, Endpoint, Failure, Passing, Reply
from tandem.recipe.pairs_settings import ServerSettings

__all__ = ["ChatRequest", "ChatServer", "Failure", "Reply", "open_server"]

_LONGEST_BACKOFF = 60.0
# A server that asks for more than this has closed for the day.
_LONGEST_WAIT = 600.0


def open_server(settings: ServerSettings, log: Callable[[str], None]) -> ChatServer:
    """The client of a recipe's server section; raises UserError when its key is not there."""
    return ChatServer(
        settings.base_url,
        settings.model,
        key_variable=settings.key_variable,
        concurrency=settings.concurrency,
        timeout=settings.timeout,
        retries=settings.retries,
        requests_per_minute=settings.requests_per_minute,
        log=log,
    )


class ChatServer:
    """A model behind an OpenAI-compatible server.

    Args:
        base_url: up to where `/chat/completions` follows, `http://localhost:8000/v1` for instance.
        model: what the server calls the model.
        key_variable: the environment variable that holds the key; None sends none.
        concurrency: requests on their way at once.
        timeout: seconds that a request may take.
        retries: further tries after a failure that may pass.
        requests_per_minute: at most so many are begun, tries included; None: no limit but the
            server's own, which answers 429.
        backoff: seconds before the first retry at most; doubled with each, and drawn at random
            below that, so that requests that failed together do not come back together.
        patience: so many requests without an answer in a row, tries included, end it.
        log: told when the server asks for a pause, and at the end how many retries there were.

    `retried` counts the retries of the last requests by reason.

    Raises UserError for a variable that is not set. The key is read from the environment here, sent
    in the header, and taken out of everything that a server says. The address is that of a recipe,
    which is refused there when it is none or has a key in it.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        requests_per_minute: float | None = None,
        backoff: float = 1.0,
        patience: int = 10,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._endpoint = Endpoint(base_url, model, key_variable=key_variable, timeout=timeout)
        self.url, self.model = self._endpoint.url, model
        self.retried: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._concurrency = concurrency
        self._retries = retries
        self._backoff = backoff
        self._patience = patience
        self._log = log or (lambda _: None)
        self._pace = _Pace(60.0 / requests_per_minute if requests_per_minute else 0.0)

    def __repr__(self) -> str:
        return f"ChatServer({self.url!r}, {self.model!r})"

    def answers(self, requests: Iterable[ChatRequest]) -> Iterator[tuple[int, Reply | Failure]]:
        """Each request's number, counted from 0, and its answer, as they arrive.

        Requests are taken from the iterable as there is room for them. A failure comes after all
        retries, or at once where another try cannot help. Closing the iterator ends the rest.

        Raises UserError for what no request can get past: a key that is refused, an address that
        is not there, or a first `patience` requests that are all refused. Raises Stopped when as
        many in a row got no answer.
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
                number, found = done.get()
                waiting -= 1
                if isinstance(found, BaseException):
                    raise found
                silence.heard(found)
                yield number, found
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
            except Passing as trouble:
                last = trouble
            if attempt == self._retries or stop.is_set():
                break
            if last.wait is not None:
                if last.wait > _LONGEST_WAIT:
                    return Failure(last.reason, f"asks to wait {last.wait:.0f} s: {last.detail}")
                if self._pace.hold(last.wait) and last.wait >= 1:
                    self._log(f"{self.url}: {last.reason}, waiting {last.wait:.0f} s")
            else:
                most = min(self._backoff * 2**attempt, _LONGEST_BACKOFF)
                stop.wait(draw.uniform(most / 2, most))
            with self._counting:
                self.retried[last.reason] += 1
        tries = f"after {self._retries + 1} tries: " if self._retries else ""
        return Failure(last.reason, tries + last.detail)


class _Silence:
    """Notices a server that answers nothing any more, or nothing at all."""

    def __init__(self, patience: int, url: str) -> None:
        self._patience, self._url = patience, url
        self._unanswered = self._refused = 0
        self._answered = False

    def heard(self, found: Reply | Failure) -> None:
        """Note one result; raises what ends it all."""
        if isinstance(found, Reply):
            self._answered, self._unanswered = True, 0
            return
        if found.reason.startswith("HTTP 4") and found.reason != "HTTP 429":
            self._refused += 1
            if not self._answered and self._refused >= self._patience:
                raise UserError(
                    f"{self._url} refused the first {self._refused} requests ({found}). Check the "
                    "model's name and the settings that are sent."
                )
            return
        self._unanswered += 1
        if self._unanswered >= self._patience:
            raise Stopped(
                f"{self._url} left {self._unanswered} requests in a row unanswered ({found}). "
                "What was answered before is kept; the same command goes on from there."
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
        """Let nobody begin for so long; whether that is news."""
        until = time.monotonic() + seconds
        with self._lock:
            news = until > self._open + 1
            self._open = max(self._open, until)
        return news
