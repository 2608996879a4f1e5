"""The encoding benchmark on so few records that its figures mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import encoding


@pytest.mark.parametrize("kind", ["conversations", "pairs"])
def test_every_side_is_measured(
    byte_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows: list[dict[str, Any]] = [
        {"question": f"What is {n}?", "chosen": "It is four.", "rejected": "No"} for n in range(3)
    ]
    if kind == "conversations":
        rows = [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": "Hello"}]}
            for q in ("Hello there", "What?")
        ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--records=20", "--sample=10", "--trl-sample=5", f"--kind={kind}", "--format=parquet",
        f"--source={tmp_path / 'rows.jsonl'}", f"--tokenizer={tmp_path / 'tokenizer'}",
        f"--scratch={tmp_path}",
    ]  # fmt: skip
    table = encoding.main(options)
    assert table in capsys.readouterr().out
    found = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert found == ["", "tandem", "the bare tokenizer", "TRL's preparation of a sample"]
    assert f"# Encoding 20 {kind}" in table
    assert "A second start: 0." in table
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "tokenizer"]


def test_no_record_is_lost_between_parts_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet

    monkeypatch.setattr(encoding, "_ROWS", 2)
    source = tmp_path / "p.jsonl"
    source.write_text('{"question": "Q", "chosen": "A", "rejected": "B"}\n')
    encoding.write_data(source, 5, tmp_path / "out.parquet")
    asked = pyarrow.parquet.read_table(tmp_path / "out.parquet")["question"].to_pylist()
    assert asked == [f"Q ({number})" for number in range(5)]


def test_records_are_drawn_and_numbered(tmp_path: Path) -> None:
    source = tmp_path / "p.jsonl"
    source.write_text('{"question": "Q", "chosen": "A", "rejected": "B"}\n')
    encoding.write_data(source, 3, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["Q (0)", "Q (1)", "Q (2)"]


def test_missing_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere\.jsonl is not here"):
        encoding.main([f"--source={tmp_path / 'nowhere.jsonl'}", f"--tokenizer={tmp_path}"])
