"""One request to an OpenAI-compatible server, and what its answer means.

Only the standard library is needed. Of the protocol, `POST {base_url}/chat/completions` is used,
without streaming.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tandem.errors import UserError

# Statuses that another try may cure; the other 4xx say what is wrong with the request.
_PASSING = frozenset({408, 409, 425, 429})
_WHOLE_RUN = frozenset({401, 403, 404, 405, 407})
_MAX_BYTES = 32 * 2**20
_SHOWN = 200


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

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class Passing(Exception):  # noqa: N818 - a reason to try again
    """What another try may cure; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, detail: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.wait = reason, detail, wait


class Endpoint:
    """A model's address: asks it once, and says what came of it.

    Args:
        base_url, model, key_variable, timeout: see `server.ChatServer`.

    Raises UserError for a variable that is not set. Address and variable are taken as they are:
    `recipe.making_pairs.Server` has looked at them.
    """

    def __init__(
        self, base_url: str, model: str, *, key_variable: str | None, timeout: float
    ) -> None:
        begins = base_url.rstrip("/").removesuffix("/chat/completions")
        self.url = f"{begins}/chat/completions"
        self.model = model
        self._key_variable = key_variable
        self._key = _key(key_variable)
        self._timeout = timeout
        # A server on this machine is asked directly, even if no_proxy does not name it.
        self._proxies = {} if is_here(urlsplit(self.url).hostname or "") else _proxies_to(self.url)
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler(self._proxies), _NoRedirect
        )

    def ask(self, request: ChatRequest) -> Reply | Failure:
        """The answer, or a failure that another try cannot help.

        Raises Passing for what another try may cure, UserError for what no request gets past.
        """
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
            text = f"no whole answer in {self._timeout:g} s"
            raise Passing("timeout", text + self._way()) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                text = f"no answer in {self._timeout:g} s"
                raise Passing("timeout", text + self._way()) from None
            raise Passing("no connection", self._plain(str(error.reason)) + self._way()) from None
        except http.client.IncompleteRead:
            raise Passing("cut answer", "the connection ended within an answer") from None
        except (http.client.HTTPException, OSError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise Passing("broken connection", self._plain(detail) + self._way()) from None

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
            said = self._plain(body.decode("utf-8", "replace"))
            raise Passing(
                "malformed answer", f"no chat completion, but {said!r}{self._way()}"
            ) from None

    def _status(self, error: urllib.error.HTTPError, deadline: float) -> Failure:
        code, reason = error.code, f"HTTP {error.code}"
        try:
            said = self._plain(_message(_whole(error, deadline)))
        except (OSError, http.client.HTTPException):
            said = ""
        said = (said or self._plain(str(error.reason))) + self._way()
        if code in _PASSING or code >= 500:
            raise Passing(reason, said, _retry_after(error.headers.get("Retry-After")))
        if code in _WHOLE_RUN or code < 400:
            raise UserError(f"{self.url}: {reason}: {said}. {self._way_out(code, error)}")
        return Failure(reason, said)

    def _way_out(self, code: int, error: urllib.error.HTTPError) -> str:
        if code in (401, 403):
            if self._key is None:
                return "It wants a key: name the environment variable that holds it (key_variable)."
            return f"It refuses the key in the environment variable {self._key_variable}."
        if code == 407:
            return "The proxy wants a name and a password: set them in its variable, or leave it."
        if code < 400:
            place = self._plain(error.headers.get("Location") or "elsewhere")
            return f"It points to {place}; requests are not sent on, so set base_url to the server."
        return "Check base_url (most end in /v1) and the model's name on the server."

    def _way(self) -> str:
        """Through which proxy the server is asked, and which variable says so; "" without one."""
        for scheme, proxy in self._proxies.items():
            variable = next(
                (n for n in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY") if os.environ.get(n)),
                "the system's settings",
            )
            # Leave out the user name and the password.
            place = proxy.rpartition("@")[2] if "@" in proxy else proxy
            host = urlsplit(self.url).hostname
            return f" (through the proxy {place} of {variable}; no_proxy={host} goes without)"
        return ""

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
    if (
        name == "localhost"
        or name.endswith(".localhost")
        or name in {own, own.split(".")[0]} - {""}
    ):
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


def _proxies_to(url: str) -> dict[str, str]:
    """The proxy of an address by scheme, as the environment says it; empty for none."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return {}
    return {parts.scheme: proxy}


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


def _writable(text: str) -> str:
    """A text without halves of characters, which JSON can spell and no file can hold: U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


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
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"key_variable: the environment variable {variable} is not set; export it with the "
            "server's key, or remove key_variable for a server that wants none"
        )
    if not key.isascii() or not key.isprintable():
        raise UserError(f"the key in {variable} has characters that no header can carry")
    return key
