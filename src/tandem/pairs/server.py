"""Any OpenAI-compatible server: many requests at a time, retried, paced, the key never shown.

Only the standard library is needed. Of the protocol, `POST {base_url}/chat/completions` is used,
without streaming.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import queue
import random
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tandem.errors import Stopped, UserError

# Statuses that another try may cure; the other 4xx say what is wrong with the request.
_PASSING = frozenset({408, 409, 425, 429})
_WHOLE_RUN = frozenset({401, 403, 404, 405})
_LONGEST_BACKOFF = 60.0
# A server that asks for more than this has closed for the day.
_LONGEST_WAIT = 600.0
_MAX_BYTES = 32 * 2**20
_SHOWN = 200
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One question: `role` and `content` of each message, and what else the body says."""

    messages: tuple[Mapping[str, str], ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer's text, and whether the model ended it by itself."""

    text: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no answer, in a word that can be counted, and in the server's own."""

    reason: str
    detail: str


class _Passing(Exception):  # noqa: N818 - a reason to try again
    """What another try may cure; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, detail: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.wait = reason, detail, wait


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
        tell: told when the server asks for a pause.

    `retried` counts the retries by reason.

    Raises UserError for an address that is none, and for a variable that is not set. The key is
    read from the environment here, sent in the header, and taken out of everything that a
    server says.
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
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.url = f"{checked_base_url(base_url)}/chat/completions"
        self.model = model
        self.retried: Counter[str] = Counter()
        self._key_variable = key_variable
        self._key = _key(key_variable)
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries
        self._backoff = backoff
        self._patience = patience
        self._tell = tell or (lambda _: None)
        self._pace = _Pace(60.0 / requests_per_minute if requests_per_minute else 0.0)
        self._opener = urllib.request.build_opener(_NoRedirect)

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
                return self._once(request)
            except _Passing as trouble:
                last = trouble
            if attempt == self._retries or stop.is_set():
                break
            if last.wait is not None:
                if last.wait > _LONGEST_WAIT:
                    return Failure(last.reason, f"asks to wait {last.wait:.0f} s: {last.detail}")
                if self._pace.hold(last.wait) and last.wait >= 1:
                    self._tell(f"{self.url}: {last.reason}, waiting {last.wait:.0f} s")
            else:
                most = min(self._backoff * 2**attempt, _LONGEST_BACKOFF)
                stop.wait(draw.uniform(most / 2, most))
            self.retried[last.reason] += 1
        tries = f"after {self._retries + 1} tries: " if self._retries else ""
        return Failure(last.reason, tries + last.detail)

    def _once(self, request: ChatRequest) -> Reply | Failure:
        body = {"model": self.model, "messages": list(request.messages), **request.options}
        call = urllib.request.Request(
            self.url,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Accept": "application/json"},
        )
        call.add_header("User-Agent", "tandem")
        if self._key is not None:
            call.add_unredirected_header("Authorization", f"Bearer {self._key}")
        deadline = time.monotonic() + self._timeout
        try:
            with self._opener.open(call, timeout=self._timeout) as response:
                return self._read(_whole(response, deadline))
        except urllib.error.HTTPError as error:
            with error:
                return self._status(error, deadline)
        except TimeoutError:
            raise _Passing("timeout", f"no whole answer in {self._timeout:g} s") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise _Passing("timeout", f"no answer in {self._timeout:g} s") from None
            raise _Passing("no connection", self._plain(str(error.reason))) from None
        except http.client.IncompleteRead:
            raise _Passing("cut answer", "the connection ended within an answer") from None
        except (http.client.HTTPException, OSError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise _Passing("broken connection", self._plain(detail)) from None

    def _read(self, body: bytes) -> Reply:
        try:
            choice = json.loads(body)["choices"][0]
            message = choice["message"]
            content = message.get("content")
            if isinstance(content, list):
                content = "".join(part["text"] for part in content if part.get("type") == "text")
            text = message.get("refusal") or "" if content is None else content
            if not isinstance(text, str):
                raise TypeError
            return Reply(text, choice.get("finish_reason") == "stop")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            said = self._plain(body.decode("utf-8", "replace"))
            raise _Passing("malformed answer", f"no chat completion, but {said!r}") from None

    def _status(self, error: urllib.error.HTTPError, deadline: float) -> Failure:
        code, reason = error.code, f"HTTP {error.code}"
        try:
            said = self._plain(_message(_whole(error, deadline)))
        except (OSError, http.client.HTTPException):
            said = ""
        said = said or self._plain(str(error.reason))
        if code in _PASSING or code >= 500:
            raise _Passing(reason, said, _retry_after(error.headers.get("Retry-After")))
        if code in _WHOLE_RUN or code < 400:
            raise UserError(f"{self.url}: {reason}: {said}. {self._way_out(code, error)}")
        return Failure(reason, said)

    def _way_out(self, code: int, error: urllib.error.HTTPError) -> str:
        if code in (401, 403):
            if self._key is None:
                return "It wants a key: name the environment variable that holds it (key_variable)."
            return f"It refuses the key in the environment variable {self._key_variable}."
        if code < 400:
            place = self._plain(error.headers.get("Location") or "elsewhere")
            return f"It points to {place}; requests are not sent on, so set base_url to the server."
        return "Check base_url (most end in /v1) and the model's name on the server."

    def _plain(self, text: str) -> str:
        """A server's words on one short line, without the key."""
        if self._key:
            text = text.replace(self._key, "[key]")
        line = " ".join(text.split())
        return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."


def checked_base_url(base_url: str) -> str:
    """A server's address without a slash at its end.

    Raises UserError for one that is no address, or that has a password or a query in it.
    """
    try:
        parts = urllib.parse.urlsplit(base_url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UserError(
            f"base_url: {base_url!r} is no address of a server; write it as "
            "http://localhost:8000/v1"
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "base_url has a name, a password or a query in it, which would be written into the "
            "run's files. Leave them out, and name the environment variable that holds the key "
            "(key_variable)."
        )
    return base_url.rstrip("/").removesuffix("/chat/completions")


def checked_variable(name: str) -> str:
    """The name of an environment variable; raises UserError, without saying it, for another."""
    if not _VARIABLE.fullmatch(name):
        raise UserError(
            "key_variable is no name of an environment variable (if it is the key itself, put "
            "that into a variable, and the variable's name here)"
        )
    return name


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
        last = f"{found.reason}: {found.detail}"
        if found.reason.startswith("HTTP 4") and found.reason != "HTTP 429":
            self._refused += 1
            if not self._answered and self._refused >= self._patience:
                raise UserError(
                    f"{self._url} refused the first {self._refused} requests ({last}). Check the "
                    "model's name and the settings that are sent."
                )
            return
        self._unanswered += 1
        if self._unanswered >= self._patience:
            raise Stopped(
                f"{self._url} left {self._unanswered} requests in a row unanswered ({last}). "
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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would lose its body, and take the key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        """Never follow."""


def _whole(response: Any, deadline: float) -> bytes:
    """A body to its end; raises TimeoutError for one that trickles past the deadline."""
    expected = response.headers.get("Content-Length")
    parts: list[bytes] = []
    size = 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > _MAX_BYTES:
            raise http.client.HTTPException(f"an answer of more than {_MAX_BYTES} bytes")
    if expected is not None and expected.isdigit() and size < int(expected):
        raise http.client.IncompleteRead(b"", int(expected) - size)
    return b"".join(parts)


def _message(body: bytes) -> str:
    """What an error's body says: OpenAI's `error.message`, or all of it."""
    text = body.decode("utf-8", "replace")
    try:
        said = json.loads(text)
        error = said.get("error", said)
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, AttributeError):
        return text


def _retry_after(text: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date; None for none."""
    if text is None:
        return None
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        at = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, at.timestamp() - time.time())


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    name = checked_variable(variable)
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"key_variable: the environment variable {name} is not set; export it with the "
            "server's key, or remove key_variable for a server that wants none"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the key in {name} has characters that no header can carry")
    return key
