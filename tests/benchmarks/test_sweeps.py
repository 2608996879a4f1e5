"""The sweeps' machinery, on points so small that their figures mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks import record, sweeps, work
from tandem.data.tokenize.chat_template import resolve_template

from .conftest import Here


def test_pairs_have_the_lengths_that_a_point_says(tmp_path: Path) -> None:
    point = sweeps.Point(share=75, length=40, vocabulary=500)
    sweeps.write_tokenizer(point.vocabulary, tmp_path)
    sweeps.write_pairs(point, 3, tmp_path / "pairs.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(tokenizer) == point.vocabulary
    resolve_template(tokenizer, work.TEMPLATE)
    trees = work.read_trees("dpo", tmp_path, work.DataSource(path=str(tmp_path / "pairs.jsonl")))
    assert len(trees) == 3
    headers = int((trees[0].sequence(0).input_ids[:-11] < len(sweeps.SPECIAL)).sum())
    assert 0 < headers < 25
    for tree in trees:
        for branch in (0, 1):
            sequence = tree.sequence(branch)
            words = (sequence.input_ids >= len(sweeps.SPECIAL)) & sequence.trained
            assert int(words.sum()) == 10
            # The prompt's 30 words; the rest is the template's, of which the tokenizer knows none.
            assert int((~sequence.trained).sum()) - 30 == headers
        assert len(tree.prefix.input_ids) >= 30


def test_every_point_is_measured_once_and_a_sweep_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "CENTRE", sweeps.Point(share=50, length=64, vocabulary=1000))
    benches: list[Here] = []

    def made(threads: int) -> Here:
        benches.append(Here(threads))
        return benches[-1]

    options = ["--size=1", "--threads=1", "--pairs=2", f"--results={tmp_path}"]
    options += ["--shares", "25", "50", "--lengths", "64", "--vocabularies", "500", "1000"]
    text = sweeps.main([*options, "--save"], apart=made)
    assert (tmp_path / "sweeps.md").read_text() == text
    assert (tmp_path / "sweeps.svg").read_text().count('role="img"') == 4
    kept = record.load(tmp_path / "sweeps.json")
    assert len(kept.settings["points"]) == 3  # the centre lies on all three axes
    assert [len(ones) for ones in kept.measured.values()] == [1] * 6
    assert benches[0].asked == ["tandem", "plain loop, 1 at a time"] * 3
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row[2:].isdigit()] == [
        "| 25", "| 50", "| 64", "| 500", "| 1000"
    ]  # fmt: skip

    last = list(kept.measured)[-1]
    kept.measured[last] = []
    kept.save(tmp_path / "sweeps.json")
    sweeps.main([*options, "--resume"], apart=made)
    assert benches[1].asked == [last.partition(": ")[2]]
