"""Where rows come from: every kind of file, and every way a file can be bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tandem.data.sources import BadLine, Row, SourceSpec, local_files, looks_like_path, read_rows
from tandem.errors import UserError

ROWS: list[dict[str, object]] = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path | str, **options: Any) -> list[Row | BadLine]:
    return list(read_rows(SourceSpec(str(path), **options)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.parquet"])
def test_each_kind_of_file_gives_rows_with_their_origin(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, ROWS)
    rows = read(file)
    assert [row.fields for row in rows if isinstance(row, Row)] == ROWS
    assert [(row.origin.file, row.origin.row) for row in rows] == [
        (str(file), 1),
        (str(file), 2),
        (str(file), 3),
    ]


def test_json_lines_under_a_json_name_are_read_with_bom_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert [(row.origin.row, row.fields) for row in read(file) if isinstance(row, Row)] == [
        (1, {"a": 1}),
        (3, {"a": 2}),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b"null", "not an object"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_bad_line_is_reported_and_the_next_is_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    first, bad, last = read(file)
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert isinstance(bad, BadLine)
    assert reason in bad.reason
    assert bad.origin.row == 2


def test_a_broken_array_ends_with_one_bad_line(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for text, bad_row in (('[{"a": 1}, {"a": ', 2), ('[{"a": 1}', 2), ("[", 1)):
        file.write_text(text)
        last = read(file)[-1]
        assert isinstance(last, BadLine)
        assert last.origin.row == bad_row
    file.write_text("[ ]")
    assert read(file) == []


def test_folders_choose_the_files_of_a_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    train = write(tmp_path / "data" / "train-00000-of-00001.parquet", ROWS)
    test = write(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[:1])
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "README.md").write_text("words")
    assert local_files(str(tmp_path)) == [train]
    assert local_files(str(tmp_path), "test") == [test]
    assert len(read(tmp_path)) == 3
    assert len(read(tmp_path, split="test")) == 1
    with pytest.raises(UserError, match=r"no files of split 'dev'.*test, train"):
        read(tmp_path, split="dev")


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.jsonl"):
        read(tmp_path)


def test_saved_datasets_folders_are_read(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(
        str(tmp_path / "both")
    )
    assert [r.fields for r in read(tmp_path / "one") if isinstance(r, Row)] == ROWS
    assert len(read(tmp_path / "both", split="test")) == 1
    assert any(file.suffix == ".arrow" for file in local_files(str(tmp_path / "both")))
    with pytest.raises(UserError, match="has the splits train, test, not 'dev'"):
        read(tmp_path / "both", split="dev")


@pytest.mark.parametrize(
    "name",
    ["./x", "/x/y", "~/x", "x.jsonl", "owner/x.json", "a/b/c", "x/", "x y", "demo:none", "a.csv"],
)
def test_what_looks_like_a_path_is_never_a_hub_id(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    assert looks_like_path(name)
    with pytest.raises(UserError, match="no file or folder"):
        read(name)


def test_a_missing_file_in_a_folder_that_exists_is_a_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not looks_like_path("runs/pairs")
    (tmp_path / "runs").mkdir()
    assert looks_like_path("runs/pairs")


def test_hub_ids_go_to_datasets_with_all_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(*args: object, **options: object) -> list[dict[str, object]]:
        calls.append((args, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("Intel/orca_dpo_pairs", split="test", subset="s", revision="v1")
    assert calls == [(("Intel/orca_dpo_pairs", "s"), {"split": "test", "revision": "v1"})]
    assert str(rows[1].origin) == "Intel/orca_dpo_pairs:test, row 2"


def test_a_hub_failure_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*args: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"nobody/nothing .*ConnectionError: no network"):
        read("nobody/nothing")


def test_options_that_cannot_apply_are_errors(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match="`subset` and `revision`"):
        read(file, subset="x")
    with pytest.raises(UserError, match="no split 'test'"):
        read(file, split="test")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"a\.parquet is no sound Parquet file"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.docx is no kind of file"):
        read(tmp_path / "a.docx")


def test_a_parquet_row_group_is_not_read_whole(tmp_path: Path) -> None:
    """One of 64 MB, as writers make them by default, in a process that says what it held."""
    import os
    import subprocess
    import sys

    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "big.parquet"
    rows = [os.urandom(8192).hex() for _ in range(4096)]
    table = pyarrow.table({"text": rows})
    pyarrow.parquet.write_table(table, file, compression="none", use_dictionary=False)
    assert pyarrow.parquet.read_metadata(file).num_row_groups == 1
    size = file.stat().st_size
    program = (
        "import pyarrow.parquet, resource, sys\n"
        "from pathlib import Path\n"
        "from tandem.data.chunks import file_chunks\n"
        "held = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = held()\n"
        "count = sum(chunk.count for chunk in file_chunks(Path(sys.argv[1])))\n"
        "print(count, held() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True
    )
    count, grown = map(int, done.stdout.split())
    assert count == 4096
    assert grown < size / 2
