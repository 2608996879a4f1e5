"""A local chat server that misbehaves as planned, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-not-to-be-seen-0123456789"


class Desk:
    """What a test sees of the server.

    Attributes:
        bodies: every request's body, in order of arrival.
        headers: the same for headers.
        plan: what happens to the request with this text as its last message, one entry a try;
            when they are used up, it is answered. An entry is a status, or one of `slow`, `drip`,
            `cut`, `cut chunks`, `garbage`, `html`, `empty`, `wrong`, `hang up`.
        answer: from a body to the text of the answer.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.plan: dict[str, list[Any]] = {}
        self.answer: Callable[[dict[str, Any]], str] = lambda body: f"to {asked(body)}"
        self.finish = "stop"
        self.retry_after: str | None = None
        self.delay = 0.0
        self.most_at_once = 0
        self.times: list[float] = []
        self.released = threading.Event()
        self.url = ""
        self._lock = threading.Lock()
        self._at_once = 0

    def come(self, body: dict[str, Any], headers: dict[str, str]) -> Any:
        """Note a request; what is to happen to it."""
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            plan = self.plan.get(asked(body)) or self.plan.get("*") or []
            return plan.pop(0) if plan else None

    def go(self) -> None:
        """A request is about to be answered."""
        with self._lock:
            self._at_once -= 1


def asked(body: dict[str, Any]) -> str:
    """The last message of a request."""
    return str(body["messages"][-1]["content"])


@contextmanager
def badly_behaved() -> Iterator[Desk]:
    """Run the server on a free port of this machine."""
    desk = Desk()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            trouble = desk.come(body, dict(self.headers))
            if desk.delay:
                time.sleep(desk.delay)
            # Once the client has the answer, its next request may come before this thread goes on.
            desk.go()
            with suppress(OSError):  # the client has left
                misbehave(self, desk, body, trouble)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that was killed is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    desk.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield desk
    finally:
        desk.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def misbehave(handler: BaseHTTPRequestHandler, desk: Desk, body: Any, trouble: Any) -> None:
    """Answer one request, in the way that was planned."""
    message = {"role": "assistant", "content": desk.answer(body)}
    good = json.dumps({"choices": [{"message": message, "finish_reason": desk.finish}]}).encode()
    kind, status, sent, length = "application/json", 200, good, len(good)
    headers = {}
    if isinstance(trouble, int):
        said = f"status {trouble}, your key was {handler.headers.get('Authorization')}"
        status, sent = trouble, json.dumps({"error": {"message": said}}).encode()
        length = len(sent)
        if desk.retry_after is not None:
            headers["Retry-After"] = desk.retry_after
        if trouble in (302, 307):
            headers["Location"] = "http://elsewhere.example/v1"
    elif trouble == "slow":
        desk.released.wait(5)
    elif trouble == "hang up":
        handler.close_connection = True
        return
    elif trouble == "cut":
        sent = good[: len(good) // 2]
    elif trouble == "garbage":
        sent = b'{"choices": [{"mess' + b"\xff\x00"
        length = len(sent)
    elif trouble == "html":
        kind, sent = "text/html", b"<html>503 from the proxy</html>"
        length = len(sent)
    elif trouble == "empty":
        sent, length = b"", 0
    elif trouble == "wrong":
        sent = json.dumps({"choices": [{"message": {"content": 3}}]}).encode()
        length = len(sent)
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    for name, value in headers.items():
        handler.send_header(name, value)
    if trouble == "cut chunks":
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n" % len(good) + good[: len(good) // 2])
        handler.close_connection = True
        return
    handler.send_header("Content-Length", str(length))
    handler.end_headers()
    if trouble == "drip":
        for byte in good:
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()
            if desk.released.wait(0.05):
                return
        return
    handler.wfile.write(sent)
    handler.close_connection = trouble == "cut"
