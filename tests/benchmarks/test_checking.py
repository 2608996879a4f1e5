"""The benchmark of `tandem check` on so few records that its figures mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import checking


def test_both_formats_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "It is a test."}]
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"conversations": turns}) + "\n")
    table = checking.main(["--records=20", f"--source={source}", f"--scratch={tmp_path}"])
    assert table in capsys.readouterr().out
    assert "# Checking 20 conversations, without a tokenizer" in table
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows == ["", "jsonl", "parquet"]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_missing_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere\.jsonl is not here"):
        checking.main([f"--source={tmp_path / 'nowhere.jsonl'}"])
