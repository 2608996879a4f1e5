"""Requests to stop: one ends the run after its step, a second one at once."""

from __future__ import annotations

import os
import signal

import pytest

from tandem.train import trainer


def _send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_an_interrupt_that_is_followed_by_sigterm_is_one_request() -> None:
    with trainer._stop_requests() as request:
        _send(signal.SIGINT)
        _send(signal.SIGTERM)
        assert request.requested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_same_request_twice_interrupts_at_once(number: signal.Signals) -> None:
    with trainer._stop_requests():
        _send(number)
        with pytest.raises(KeyboardInterrupt):
            _send(number)


def test_another_request_much_later_interrupts_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    with trainer._stop_requests():
        _send(signal.SIGINT)
        monkeypatch.setattr(trainer, "_SAME_REQUEST", -1.0)
        with pytest.raises(KeyboardInterrupt):
            _send(signal.SIGTERM)
