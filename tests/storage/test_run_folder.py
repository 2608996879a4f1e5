"""Names in a run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tandem.storage.run_folder import MOST_ROUNDS, STAGES, Stage, run_of, stage_at, stage_folder


@pytest.mark.parametrize("number", [1, 2, MOST_ROUNDS])
def test_a_stage_is_known_by_its_folder(number: int) -> None:
    for work in STAGES:
        folder = stage_folder("runs/own", work, number)
        assert stage_at(folder) == Stage(work, number)
        assert run_of(folder) == Path("runs/own")


def test_another_folder_is_no_stages() -> None:
    assert stage_at(Path("out/dpo")) is None
