"""What users keep between versions stays: hashes of inputs, keys of caches, files, help, dry runs.

A change of structure leaves all of it alone. One that is meant to change it writes `pinned.json`
anew, see `pinned.py`.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.pins import pinned

WAS = json.loads(pinned.FILE.read_text())


@pytest.fixture(scope="module")
def now(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return json.loads(json.dumps(pinned.pinned(tmp_path_factory.mktemp("pins"))))


@pytest.mark.parametrize("command", sorted(WAS["help"]))
def test_help_is_as_it_was(now: dict[str, Any], command: str) -> None:
    assert now["help"][command] == WAS["help"][command]


@pytest.mark.parametrize("recipe", pinned.RECIPES)
def test_dry_runs_are_as_they_were(now: dict[str, Any], recipe: str) -> None:
    assert now["dry_runs"][recipe] == WAS["dry_runs"][recipe]


@pytest.mark.parametrize("stage", sorted(WAS["stages"]["folders"]))
def test_a_finished_stage_is_recognised_and_has_its_files(now: dict[str, Any], stage: str) -> None:
    assert now["stages"]["folders"][stage] == WAS["stages"]["folders"][stage]


def test_encoded_data_is_found_again(now: dict[str, Any]) -> None:
    assert now["stages"]["encodings"] == WAS["stages"]["encodings"]


def test_stored_reference_log_probs_are_found_again(now: dict[str, Any]) -> None:
    assert now["reference"]["inputs"] == WAS["reference"]["inputs"]
    if now["reference"]["numerics"] != WAS["reference"]["numerics"]:
        pytest.skip("the keys hold which kernels this processor has: they are others")
    assert now["reference"]["keys"] == WAS["reference"]["keys"]
