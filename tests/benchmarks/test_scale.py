"""The scale benchmark on so few records that its figures mean nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scale


def test_every_command_is_measured_on_every_format(
    byte_tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan in a process of its own; the others only as far as they are asked for."""
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    started: list[list[str]] = []
    really = scale.run

    def run(name: str, command: list[str], cache: Path) -> scale.Ran:
        started.append(command)
        if name == "plan":
            return really(name, command, cache)
        encoded = {"seconds": 1.0, "records": 60, "tokens": 900}
        return scale.Ran(name, 3.0, 10**8, {} if name == "check" else encoded)

    monkeypatch.setattr(scale, "run", run)
    options = ["--records=60", f"--tokenizer={tmp_path / 'tokenizer'}", f"--scratch={tmp_path}",
               "--formats", "parquet"]  # fmt: skip
    table = scale.main(options)
    assert table in capsys.readouterr().out
    named = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert named[1].startswith("**parquet, ")
    assert named[2] == "encode (60 records, 900 tokens)"
    assert named[3] == "second start (60 records, 900 tokens)"
    assert named[4:] == ["plan", "check"]
    assert started[0] == started[1]
    (task,) = (json.loads(word) for word in started[0] if word.startswith("{"))
    assert task["data"].endswith("data.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


@pytest.mark.parametrize("form", scale._FORMATS)
def test_all_records_are_written_the_same_each_time(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet

    monkeypatch.setattr(scale, "_ROWS", 7)
    path = tmp_path / f"data.{form}"
    scale.write_records(40, path)
    if form == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    assert rows == list(scale.records(40)) == list(scale.records(40))
    asked = [row["conversations"][0]["value"] for row in rows]
    assert [text.partition(":")[0] for text in asked] == [f"Question {n}" for n in range(40)]


def test_records_vary_and_some_are_rare() -> None:
    answers = [row["conversations"][1]["value"] for row in scale.records(600)]
    assert answers.count("") == pytest.approx(6, abs=5)
    lengths = sorted(len(answer.split()) for answer in answers if answer)
    assert lengths[0] < 20 < 150 < lengths[-20]
    assert lengths[-1] > 2000


def test_the_page_says_what_was_missed() -> None:
    said = {"seconds": 6.5, "records": 3, "tokens": 9}
    runs = [scale.Ran("second start", 9.0, 2_500_000_000, said), scale.Ran("plan", 4.0, 10**8, {})]
    options = scale._parse(["--records", "3", "--formats", "jsonl"])
    page = scale.page(options, {"jsonl": (10**9, runs)})
    assert "| second start (3 records, 9 tokens) | 6.5 (imports 2.5) | 2500 MB | **no** |" in page
    assert "| plan | 4.0 | 100 MB | yes |" in page
    assert "jsonl: second start held 2.50 GB, more than 2" in page
    assert "the second start took 6.5 s beyond imports, more than 5" in page
    assert "All stayed below" not in page
    assert "All stayed below" in scale.page(options, {"jsonl": (10**9, runs[1:])})
