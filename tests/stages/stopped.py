"""Runs that die on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tandem.train import trainer


@contextmanager
def dying_before(number: int) -> Iterator[None]:
    """Inside, a run dies before the step of this number, from 0; a test fails if it does not."""
    plain = trainer.Trainer._take

    def take(self: Any, step: Any) -> Any:
        if step.number == number:
            raise ZeroDivisionError
        return plain(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_take", take)
        with pytest.raises(ZeroDivisionError):
            yield
