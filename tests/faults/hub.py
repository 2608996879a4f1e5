"""A stand-in for the Hub: the few addresses of its API that fetching a model or data set needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(\w+|paths-info)/(\w+)(?:/(.*))?)?")
_FILE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)")


@dataclass
class Hub:
    """What the server holds, and what it was asked.

    `repos` has the files of `models/owner/name` and `datasets/owner/name`; `refusals` the status
    and error code of those that it refuses.
    """

    repos: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""
    close: Callable[[], None] = lambda: None  # nothing listens at its address afterwards


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free local port; its `address` is then set."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()

        def close() -> None:
            server.shutdown()
            thread.join()
            server.server_close()

        hub.close = close
        try:
            yield hub
        finally:
            close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        api, file = _API.fullmatch(path), _FILE.fullmatch(path)
        if api:
            kind, name, what, revision, folder = api.groups()
            self._describe(f"{kind}/{name}", what, revision, folder or "", body)
        elif file:
            kind = "datasets" if file[1] else "models"
            self._give(f"{kind}/{file[2]}", file[3], file[4])
        else:
            self._send(404, b"{}", {})

    def _files(self, repo: str, revision: str | None) -> Mapping[str, bytes] | None:
        """The files of a repository; None after having refused."""
        status, code = self.hub.refusals.get(repo, (0, ""))
        if not status and repo not in self.hub.repos:
            status, code = 404, "RepoNotFound"
        if not status and revision not in (None, "main", COMMIT):
            status, code = 404, "RevisionNotFound"
        if status:
            self._send(status, b'{"error": "refused"}', {"X-Error-Code": code})
            return None
        return self.hub.repos[repo]

    def _describe(
        self, repo: str, what: str | None, revision: str | None, folder: str, body: bytes
    ) -> None:
        files = self._files(repo, revision)
        if files is None:
            return
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
            for name, data in files.items()
        ]
        if what == "paths-info":
            wanted = _wanted(body)
            self._json([entry for entry in entries if entry["path"] in wanted])
        elif what == "tree" and folder:  # the repositories here are flat
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif what == "tree":
            self._json(entries)
        else:
            siblings = [{"rfilename": name} for name in files]
            name = repo.partition("/")[2]
            shown = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
            self._json(shown)

    def _give(self, repo: str, revision: str, name: str) -> None:
        files = self._files(repo, revision)
        if files is None:
            return
        head = {"X-Repo-Commit": COMMIT}
        if name not in files:
            self._send(404, b"", {**head, "X-Error-Code": "EntryNotFound"})
            return
        self._send(200, files[name], {**head, "ETag": f'"{_digest(files[name])}"'})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _wanted(body: bytes) -> set[str]:
    text = body.decode()
    if text.startswith("{"):
        return set(json.loads(text)["paths"])
    return set(parse_qs(text).get("paths", []))
