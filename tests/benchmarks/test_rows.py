"""Whole rows against their pairs, so short that the figures mean nothing; the losses are equal."""

from __future__ import annotations

import pytest
from benchmarks.training import SHARED

from benchmarks import rows


@pytest.mark.skipif(not SHARED.exists(), reason="needs the data beside the repository")
def test_whole_rows_feed_fewer_tokens_and_have_the_loss_of_their_pairs(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path_factory.mktemp("results"))
    options = ["--rows=2", "--size=1", "--repeats=1", "--threads=1", "--without-trl", "--save"]
    page = rows.main(options)
    assert page == (rows.RESULTS / "rows.md").read_text()
    table = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| tandem")]
    whole, apart = (int(cells[1].replace(",", "")) for cells in table)
    assert whole < apart / 2
