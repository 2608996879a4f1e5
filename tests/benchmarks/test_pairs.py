"""The comparison of generation, so short that its figures mean nothing."""

from __future__ import annotations

from pathlib import Path

from benchmarks import pairs

from ..stages.made_inputs import make_conversations, make_model_folder


def test_both_sides_say_the_same(tmp_path: Path) -> None:
    make_model_folder(tmp_path / "tiny")
    data = make_conversations(tmp_path / "set.jsonl", 12)
    options = [f"--models={tmp_path / 'tiny'}", f"--prompts={data}", "--count=12", "--tokens=5",
               "--repeats=2", "--threads=1", "--save", f"--results={tmp_path}"]  # fmt: skip
    page = pairs.main(options)
    assert page == (tmp_path / "pairs.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| tiny")]
    assert [row[1] for row in rows] == ["likeliest", "sampled"]
    assert [row[5] for row in rows] == ["12 of 12 |", "- |"]
    assert all(float(row[4].partition("x")[0]) > 0 for row in rows)
