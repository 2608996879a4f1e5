"""The client of OpenAI-compatible servers against one that misbehaves as planned."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import pytest

from tandem.errors import Stopped, UserError
from tandem.integrations.chat_request import Endpoint, is_here
from tandem.integrations.chat_server import ChatRequest, ChatServer, Failure, Reply
from tandem.recipe.pairs_settings import ServerSettings

from .badly_behaved import KEY, Desk, asked, badly_behaved


@pytest.fixture
def desk() -> Iterator[Desk]:
    with badly_behaved() as desk:
        yield desk


def ask(text: str, **options: Any) -> ChatRequest:
    return ChatRequest(({"role": "user", "content": text},), options)


def settings(url: str, **options: Any) -> ServerSettings:
    return ServerSettings(base_url=url, model="m", **{"timeout": 5, **options})


def server(desk: Desk, **options: Any) -> ChatServer:
    return at(desk.url, **options)


def at(url: str, **options: Any) -> ChatServer:
    own = {key: options.pop(key) for key in ("patience", "log") if key in options}
    own["backoff"] = options.pop("backoff", 0.01)
    return ChatServer(settings(url, **options), **own)


def found(client: ChatServer, *texts: str) -> list[Reply | Failure]:
    """The answers in the requests' order; each comes once."""
    pairs = list(client.answers(ask(text) for text in texts))
    assert sorted(number for number, _ in pairs) == list(range(len(texts)))
    return [answer for _, answer in sorted(pairs, key=lambda pair: pair[0])]


def test_every_request_gets_its_own_answer(desk: Desk) -> None:
    texts = [f"question {i}" for i in range(50)]
    desk.delay = 0.01
    answers = found(server(desk, concurrency=4), *texts)
    assert answers == [Reply(f"to {text}", True) for text in texts]
    assert 1 < desk.most_at_once <= 4
    (body,) = [body for body in desk.bodies if asked(body) == "question 7"]
    assert body == {"model": "m", "messages": [{"role": "user", "content": "question 7"}]}
    assert not any("Authorization" in headers for headers in desk.headers)


def test_options_are_sent_and_the_limit_is_no_stop(desk: Desk) -> None:
    desk.finish = "length"
    ((_, answer),) = server(desk).answers([ask("x", temperature=0.5, max_tokens=3)])
    assert answer == Reply("to x", False)
    assert (desk.bodies[0]["temperature"], desk.bodies[0]["max_tokens"]) == (0.5, 3)


def test_a_half_character_in_an_answer_becomes_a_sign_that_can_be_written(desk: Desk) -> None:
    desk.answer = lambda _: "half \ud83d, whole \U0001f642"
    ((_, answer),) = server(desk).answers([ask("x")])
    assert answer == Reply("half \ufffd, whole \U0001f642", True)
    client = Endpoint(settings(desk.url, timeout=5))
    assert client._plain("no \ud83d") == "no \ufffd"


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (429, "HTTP 429"), (500, "HTTP 500"), (502, "HTTP 502"), (503, "HTTP 503"),
        (408, "HTTP 408"), ("cut", "cut answer"), ("cut chunks", "cut answer"),
        ("garbage", "malformed answer"), ("html", "malformed answer"),
        ("empty", "malformed answer"), ("wrong", "malformed answer"),
        ("hang up", "broken connection"), ("slow", "timeout"), ("drip", "timeout"),
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_again(desk: Desk, trouble: Any, reason: str) -> None:
    desk.plan = {"b": [trouble, trouble]}
    client = server(desk, timeout=0.3)
    assert found(client, "a", "b", "c") == [Reply(f"to {text}", True) for text in "abc"]
    assert client.retried == {reason: 2}
    desk.plan = {"b": [trouble] * 3}
    answer = found(server(desk, timeout=0.3, retries=2), "a", "b", "c")[1]
    assert isinstance(answer, Failure)
    assert answer.reason == reason
    assert answer.detail.startswith("after 3 tries: ")


def test_a_request_that_the_server_refuses_fails_alone_and_at_once(desk: Desk) -> None:
    desk.plan = {"b": [400, 400], "d": [422]}
    answers = found(server(desk, concurrency=1), *"abcd")
    assert [type(answer) for answer in answers] == [Reply, Failure, Reply, Failure]
    assert len(desk.bodies) == 4
    assert answers[1] == Failure("HTTP 400", "status 400, your key was None")


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "It refuses the key in the environment variable A_KEY"),
        (403, "It refuses the key"),
        (404, "Check base_url"),
        (302, "It points to http://elsewhere.example/v1"),
        (307, "requests are not sent on"),
    ],
)
def test_what_no_request_gets_past_ends_it_at_once(
    desk: Desk, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    desk.plan = {"*": [status] * 100}
    with pytest.raises(UserError, match=said) as error:
        found(server(desk, key_variable="A_KEY", concurrency=2), *"abcdefgh")
    assert len(desk.bodies) <= 4
    assert KEY not in str(error.value)
    assert "Bearer [key]" in str(error.value)


def test_without_a_key_the_way_to_give_one_is_said(desk: Desk) -> None:
    desk.plan = {"*": [401]}
    with pytest.raises(UserError, match="It wants a key: name the environment variable"):
        found(server(desk), "a")


def test_the_key_is_sent_and_shown_nowhere(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", f" {KEY}\n")
    desk.plan = {"b": [400], "c": [500] * 9}
    client = server(desk, key_variable="A_KEY", retries=1)
    answers = found(client, *"abc")
    assert {headers["Authorization"] for headers in desk.headers} == {f"Bearer {KEY}"}
    assert KEY not in repr((client, answers, client.retried))
    assert "[key]" in repr(answers)


def test_a_key_that_is_not_there() -> None:
    with pytest.raises(UserError, match="environment variable NO_SUCH_KEY is not set"):
        at("http://a/v1", key_variable="NO_SUCH_KEY")


@pytest.mark.parametrize("end", ["", "/", "/chat/completions"])
def test_the_address_may_end_in_any_way(desk: Desk, end: str) -> None:
    assert found(at(f"{desk.url}{end}"), "a") == [Reply("to a", True)]


def test_all_wait_as_long_as_the_server_asks(desk: Desk) -> None:
    desk.plan = {"0": [429]}
    desk.retry_after = "0.6"
    told: list[str] = []
    client = server(desk, concurrency=2, backoff=30, log=told.append)
    assert len(found(client, *map(str, range(6)))) == 6
    refused = desk.times[[asked(body) for body in desk.bodies].index("0")]
    # What was on its way already comes through; everything else waits.
    late = [t - refused for t in desk.times if t > refused + 0.3]
    assert len(late) >= 3
    assert min(late) >= 0.55
    desk.plan, desk.retry_after = {"x": [503]}, "1"
    found(server(desk, log=told.append), "x")
    assert [line.partition(": ")[2] for line in told] == [
        "1 requests were sent again (HTTP 429: 1)",
        "HTTP 503, waiting 1 s",
        "1 requests were sent again (HTTP 503: 1)",
    ]


def test_a_date_is_a_time_to_wait_for_and_a_day_is_too_long(desk: Desk) -> None:
    desk.plan, desk.retry_after = {"a": [429]}, formatdate(time.time() + 1, usegmt=True)
    began = time.monotonic()
    assert found(server(desk, backoff=30), "a") == [Reply("to a", True)]
    assert time.monotonic() - began < 20
    desk.plan, desk.retry_after = {"a": [429]}, "86400"
    (answer,) = found(server(desk), "a")
    assert isinstance(answer, Failure)
    assert answer.detail.startswith("asks to wait 86400 s")


def test_requests_are_spaced_out(desk: Desk) -> None:
    found(server(desk, requests_per_minute=1200), *"abcdef")
    gaps = [b - a for a, b in zip(desk.times, desk.times[5:], strict=False)]
    assert gaps[0] >= 5 * 0.05 - 0.04


def test_a_dead_server_stops_the_run_and_a_wrong_model_refuses_it(desk: Desk) -> None:
    desk.plan = {"*": [500] * 1000}
    with pytest.raises(Stopped, match="3 requests in a row unanswered") as stop:
        found(server(desk, patience=3, retries=1), *"abcdefgh")
    assert "the same command resumes" in str(stop.value)
    desk.plan = {"*": [400] * 1000}
    with pytest.raises(UserError, match="refused the first 3 requests"):
        found(server(desk, patience=3), *"abcdefgh")
    nobody = at("http://127.0.0.1:9/v1", retries=1, backoff=0.01, patience=2)
    with pytest.raises(Stopped, match="no connection"):
        found(nobody, *"abcdefgh")


def test_requests_are_taken_as_there_is_room_and_leaving_early_ends_them(desk: Desk) -> None:
    taken: list[int] = []

    def requests() -> Iterator[ChatRequest]:
        for i in range(1000):
            taken.append(i)
            yield ask(str(i))

    desk.delay = 0.02
    before = set(threading.enumerate())
    answers = server(desk, concurrency=2).answers(requests())
    for _ in range(3):
        next(answers)
    # The other new threads are those of the desk, which waits for more on open connections.
    workers = [one for one in set(threading.enumerate()) - before if "(_work)" in one.name]
    assert len(workers) == 2
    answers.close()  # type: ignore[attr-defined]
    assert len(taken) <= 3 + 4
    for worker in workers:
        worker.join(timeout=60)
    assert not any(worker.is_alive() for worker in workers)
    # Each that was taken was asked at most once, and nobody is left who would ask more.
    assert 3 <= len(desk.bodies) <= len(taken)


_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment with a proxy at which nobody listens, and no exceptions."""
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("http_proxy", "http://somebody:secret@127.0.0.1:9")
    return monkeypatch


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "0.0.0.0", "LOCALHOST"])
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_no_proxy_comes_between_us_and_a_server_on_this_machine(
    desk: Desk, proxied: pytest.MonkeyPatch, host: str, variable: str
) -> None:
    proxied.delenv("http_proxy")
    proxied.setenv(variable, "http://127.0.0.1:9")
    client = at(desk.url.replace("127.0.0.1", host), timeout=5, backoff=0.01)
    assert found(client, "x") == [Reply("to x", True)]


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("::1", True), ("::", True), ("::ffff:127.0.0.1", True), ("127.9.9.9", True),
        ("model.localhost", True), (socket.gethostname(), True), ("10.0.0.1", False),
        ("localhost.example", False), ("127.0.0.1.example", False), ("", False),
        ("LOCALHOST.", True), ("fe80::1%e", False),
    ],
)  # fmt: skip
def test_what_this_machine_is_called(host: str, here: bool) -> None:
    assert is_here(host) is here


def test_a_proxy_that_fails_is_named_with_its_variable_and_without_its_password(
    proxied: pytest.MonkeyPatch,
) -> None:
    client = at("http://models.example/v1", timeout=5, retries=0, patience=1)
    with pytest.raises(Stopped) as caught:
        found(client, "x")
    message = str(caught.value)
    assert "through the proxy 127.0.0.1:9 of http_proxy; no_proxy=models.example" in message
    assert "secret" not in message


def test_a_proxy_is_asked_for_servers_elsewhere_and_no_proxy_is_heeded(
    desk: Desk, proxied: pytest.MonkeyPatch
) -> None:
    proxied.setenv("HTTP_PROXY", desk.url.removesuffix("/v1"))
    proxied.delenv("http_proxy")
    assert found(at("http://models.example/v1", timeout=5), "x") == [Reply("to x", True)]
    for exception in ("models.example", "models.example:8123", ".example", "*"):
        proxied.setenv("no_proxy", exception)
        endpoint = Endpoint(settings("http://models.example:8123/v1", timeout=1))
        assert (exception, endpoint._way()) == (exception, "")


def test_a_proxy_that_wants_a_password_is_told_from_the_server(
    desk: Desk, proxied: pytest.MonkeyPatch
) -> None:
    proxied.setenv("http_proxy", desk.url.removesuffix("/v1"))
    desk.plan = {"*": [407] * 9}
    with pytest.raises(UserError, match="The proxy wants a name and a password"):
        found(at("http://models.example/v1", timeout=5), "x")
