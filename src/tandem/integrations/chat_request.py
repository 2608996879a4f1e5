"""One `POST {base_url}/chat/completions` to an OpenAI-compatible server, and what it answers."""

from __future__ import annotations

import email.utils
import ipaddress
import json
import os
import socket
import ssl
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2

from tandem.errors import UserError
from tandem.recipe.pairs_settings import ServerSettings

# Statuses that another try may cure; other 4xx blame the request.
_MAY_PASS = frozenset({408, 409, 425, 429})
_WHOLE_RUN = frozenset({401, 403, 404, 405, 407})
_MAX_BYTES = 32 * 2**20
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One question."""

    messages: tuple[Mapping[str, str], ...]  # `role` and `content` of each
    options: Mapping[str, Any] = field(default_factory=dict)  # what else the body says


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer's text, and whether the model ended it by itself."""

    text: str
    stopped: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request has no answer."""

    reason: str  # in a word that can be counted
    detail: str  # in the server's words
    may_pass: bool = False  # whether the same request may get an answer later

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class RetryableError(Exception):
    """A failure that another try may cure; the server asks to `wait` so many seconds."""

    def __init__(self, reason: str, detail: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.wait = reason, detail, wait


class Endpoint:
    """A model's address: sends one request at a time. UserError for an unset variable."""

    def __init__(self, server: ServerSettings) -> None:
        begins = server.base_url.rstrip("/").removesuffix("/chat/completions")
        self.url = f"{begins}/chat/completions"
        self.model = server.model
        self._key_variable = server.key_variable
        self._key = _key(server.key_variable)
        self._timeout = server.timeout
        self._proxy = _proxy_to(self.url)
        headers = {"User-Agent": "tandem", "Accept": "application/json"}
        headers |= {"Accept-Encoding": "identity", "Connection": "close"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        # A redirected POST would lose its body, and take the key elsewhere.
        self._client = httpx2.Client(
            headers=headers, proxy=self._proxy, timeout=server.timeout, follow_redirects=False,
            trust_env=False, verify=ssl.create_default_context(),
            limits=httpx2.Limits(max_keepalive_connections=0),
        )  # fmt: skip

    def ask(self, request: ChatRequest) -> Reply | Failure:
        """The answer, or a failure that another try cannot cure.

        Raises RetryableError for a failure that another try may cure, and UserError for one that
        every request would meet.
        """
        body = {"model": self.model, "messages": list(request.messages), **request.options}
        deadline = time.monotonic() + self._timeout
        begun = False
        try:
            with self._client.stream("POST", self.url, json=body) as response:
                begun = True
                if response.is_success:
                    return self._read(_whole(response, deadline))
                return self._status(response, deadline)
        except httpx2.TimeoutException:
            text = f"no whole answer in {self._timeout:g} s"
            raise RetryableError("timeout", text + self._way()) from None
        except (httpx2.ConnectError, httpx2.ProxyError) as error:
            raise RetryableError("no connection", self._plain(str(error)) + self._way()) from None
        except (httpx2.TransportError, httpx2.StreamError) as error:
            if begun and isinstance(error, httpx2.RemoteProtocolError):
                raise RetryableError(
                    "cut answer", "the connection ended within an answer"
                ) from None
            detail = self._plain(f"{type(error).__name__}: {error}") + self._way()
            raise RetryableError("broken connection", detail) from None

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
            return Reply(_writable(text), choice.get("finish_reason") == "stop")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            text = self._plain(body.decode("utf-8", "replace"))
            detail = f"no chat completion, but {text!r}{self._way()}"
            raise RetryableError("malformed answer", detail) from None

    def _status(self, response: httpx2.Response, deadline: float) -> Failure:
        code, reason = response.status_code, f"HTTP {response.status_code}"
        try:
            detail = self._plain(_message(_whole(response, deadline)))
        except httpx2.TransportError:
            detail = ""
        detail = (detail or self._plain(response.reason_phrase)) + self._way()
        if code in _MAY_PASS or code >= 500:
            raise RetryableError(reason, detail, _retry_after(response.headers.get("Retry-After")))
        if code in _WHOLE_RUN or code < 400:
            place = self._plain(response.headers.get("Location") or "elsewhere")
            raise UserError(f"{self.url}: {reason}: {detail}. {self._way_out(code, place)}")
        return Failure(reason, detail)

    def _way_out(self, code: int, place: str) -> str:
        if code in (401, 403):
            if self._key is None:
                return "It wants a key: name the environment variable that holds it (key_variable)."
            return f"It refuses the key in the environment variable {self._key_variable}."
        if code == 407:
            return "The proxy wants a name and a password: set them in its variable, or leave it."
        if code < 400:
            return f"It points to {place}; requests are not sent on, so set base_url to the server."
        return "Check base_url (most end in /v1) and the model's name on the server."

    def _way(self) -> str:
        """Through which proxy the server is asked, and which variable says so; "" without one."""
        if self._proxy is None:
            return ""
        address = urlsplit(self.url)
        names = (f"{address.scheme}_proxy", f"{address.scheme.upper()}_PROXY")
        variable = next((name for name in names if os.environ.get(name)), "the system's settings")
        place = self._proxy.rpartition("@")[2]  # without user name and password
        host = address.hostname
        return f" (through the proxy {place} of {variable}; no_proxy={host} goes without)"

    def _plain(self, text: str) -> str:
        """A server's words on one short line, without the key."""
        if self._key:
            text = text.replace(self._key, "[key]")
        line = " ".join(_writable(text).split())
        return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."


def is_here(host: str) -> bool:
    """Whether a host is this machine: the loopback, every address of it, or its own name.

    Nothing is looked up. `host` is as in an address, IPv6 without brackets.
    """
    name = host.rstrip(".").lower()
    own = socket.gethostname().lower()
    if name.endswith(".localhost") or name in {"localhost", own, own.split(".")[0]} - {""}:
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        try:  # 127.1 and other short forms
            address = ipaddress.ip_address(socket.inet_aton(name))
        except (OSError, ValueError):
            return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def _proxy_to(url: str) -> str | None:
    """The proxy of an address, as the environment says it; a server on this machine needs none."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or is_here(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc):
        return None
    return proxy


def _whole(response: httpx2.Response, deadline: float) -> bytes:
    """A body to its end; raises ReadTimeout for one that trickles past the deadline."""
    body = bytearray()
    for part in response.iter_raw():
        body += part
        if time.monotonic() > deadline:
            raise httpx2.ReadTimeout("the deadline is past")
        if len(body) > _MAX_BYTES:
            raise httpx2.ReadError(f"an answer of more than {_MAX_BYTES} bytes")
    return bytes(body)


def _writable(text: str) -> str:
    """Replace lone surrogates, which JSON can spell and no file can hold, by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _message(body: bytes) -> str:
    """What an error's body says: OpenAI's `error.message`, or all of it."""
    text = body.decode("utf-8", "replace")
    try:
        values = json.loads(text)
        error = values.get("error", values)
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, AttributeError):
        return text


def _retry_after(text: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date; None for none."""
    if text is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(text))
    with suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"key_variable: the environment variable {variable} is not set; export it with the "
            "server's key, or remove key_variable for a server that wants none"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the key in {variable} has characters that no header can carry")
    return key
