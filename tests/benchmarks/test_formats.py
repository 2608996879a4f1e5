"""The comparison of number formats, so short that its figures mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import formats
from tandem.recipe.training_settings import SftSettings


def test_the_page_has_every_run_and_every_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(formats, "SftSettings", lambda **s: SftSettings(**s | {"batch_size": 4}))
    options = ["--steps=2", "--repeats=1", "--questions=4", "--hidden=256", "--threads=1"]
    page = formats.main([*options, "--save", f"--results={tmp_path}"])
    assert page == (tmp_path / "formats.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert set(formats.RUNS) <= cells.keys()
    trained = cells["4-bit base and adapter, as trained"]
    seen = cells["merged into the weights it was trained on"]
    original = cells["merged into the original weights"]
    assert float(trained[1]) == 0
    assert float(seen[1]) < 1e-5 < 1e-3 < float(original[1])
    before, after = formats.layer_bytes(256)
    assert 3.5 < before / after < 4
