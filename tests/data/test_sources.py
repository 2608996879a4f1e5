"""Where rows come from: every kind of file, and every way a file can be bad."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tandem.data.sources.chunks import LATIN
from tandem.data.sources.rows import BadLine, Row, local_files, looks_like_path, read_rows
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

ROWS: list[dict[str, object]] = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]


def content(kind: str, rows: list[dict[str, object]]) -> bytes:
    """What a file of a kind holds."""
    if kind == ".json":
        return json.dumps(rows, indent=1).encode()
    if kind in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(rows[0]), delimiter="," if kind == ".csv" else "\t")
        table.writeheader()
        table.writerows(rows)
        return text.getvalue().encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".arrow":
        new = pyarrow.ipc.new_stream if "stream" in path.name else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as out:
            out.write_table(table)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(content(path.with_suffix("").suffix, rows)))
    elif path.suffix == ".zst":
        path.write_bytes(zstd(content(path.with_suffix("").suffix, rows)))
    else:
        path.write_bytes(content(path.suffix, rows))
    return path


def read(path: Path | str, **options: Any) -> list[Row | BadLine]:
    return list(read_rows(DataSource(path=str(path), **options)))


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.ndjson",
        "a.json",
        "a.csv",
        "a.tsv",
        "a.parquet",
        "a.arrow",
        "stream.arrow",
        "a.jsonl.gz",
        "a.json.gz",
        "a.csv.gz",
        "a.jsonl.zst",
        "a.json.zst",
        "a.tsv.zst",
    ],
)
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
    for text, bad_row in (
        ('[{"a": 1}, {"a": ', 2),
        ('[{"a": 1}', 2),
        ("[", 1),
        ("[]]", 1),
        ('[{"a": 1}] [2]', 2),
    ):
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

    def load_dataset(*args: object, **options: object) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("Intel/orca_dpo_pairs", split="test", subset="s", revision="v1")
    assert calls == [(("Intel/orca_dpo_pairs", "s"), {"split": "test", "revision": "v1"})]
    assert str(rows[1].origin) == "Intel/orca_dpo_pairs:test, row 2"


@pytest.mark.parametrize("said", ["no network", "no network."])
def test_a_hub_failure_is_one_message(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*args: object, **options: object) -> None:
        raise ConnectionError(said)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"nothing .*ConnectionError: no network\. Check name"):
        read("nobody/nothing")


def test_options_that_cannot_apply_are_errors(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match="`subset` and `revision`"):
        read(file, subset="x")
    with pytest.raises(UserError, match="no split 'test'"):
        read(file, split="test")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"a\.parquet is a damaged Parquet file"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.docx is not of a kind"):
        read(tmp_path / "a.docx")
    for arrow in (b"", b"ARROW1 and no more", b"no stream of Arrow's"):
        (tmp_path / "a.arrow").write_bytes(arrow)
        with pytest.raises(UserError, match=r"a\.arrow is a damaged Arrow file"):
            read(tmp_path / "a.arrow")
    (tmp_path / "a.gz").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a\.gz is not of a kind"):
        read(tmp_path / "a.gz")


def bad(rows: list[Row | BadLine]) -> list[tuple[int, str]]:
    return [(row.origin.row, row.reason) for row in rows if isinstance(row, BadLine)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_a_compressed_file_that_breaks_off_is_read_up_to_there(
    tmp_path: Path, kind: str, suffix: str
) -> None:
    noise = random.Random(1)
    rows: list[dict[str, object]] = [
        {"question": f"q{i}", "answer": noise.randbytes(300).hex()} for i in range(2000)
    ]
    file = write(tmp_path / f"a{kind}{suffix}", rows)
    whole = file.read_bytes()
    assert [row.fields for row in read(file) if isinstance(row, Row)] == rows
    for size in (len(whole) // 2, len(whole) - 3, 5):
        file.write_bytes(whole[:size])
        found = read(file)
        sound = [row.fields for row in found if isinstance(row, Row)]
        assert sound == rows[: len(sound)]
        assert len(sound) > size / len(whole) * 1800 - 100
        ((row, reason),) = bad(found)
        assert row == len(sound) + 1
        assert "cut off" in reason
        assert f"the {'gzip' if suffix == '.gz' else 'zstd'} data is" in reason
    file.write_bytes(b"neither of both")
    assert "damaged" in bad(read(file))[0][1]
    file.write_bytes(b"")
    assert read(file) == []


def test_gzip_may_have_parts_and_padding_but_no_rubbish(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    parts = [gzip.compress(content(".jsonl", ROWS[i : i + 1])) for i in range(3)]
    file.write_bytes(b"".join(parts) + bytes(100))
    assert [row.fields for row in read(file) if isinstance(row, Row)] == ROWS
    file.write_bytes(b"".join(parts) + b"rubbish")
    assert len(read(file)) == 4
    ((row, reason),) = bad(read(file))
    assert (row, "the gzip data is damaged" in reason) == (4, True)


def test_compressed_lines_have_the_bad_ones_in_their_place(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    lines = [b"\xef\xbb\xbf" + b'{"a": 1}', b"", b'{"a": "\xff"}', b"{", b'{"a": 5}']
    file.write_bytes(gzip.compress(b"\r\n".join(lines)))
    found = read(file)
    assert [(row.origin.row, isinstance(row, Row)) for row in found] == [
        (1, True), (3, False), (4, False), (5, True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (b'a,b\r\n"x, ""y""","1\n2\r\n3"\r\n', [{"a": 'x, "y"', "b": "1\n2\r\n3"}]),
        (b"\xef\xbb\xbfa,b\n\n1,\n", [{"a": "1", "b": ""}]),
        (b"a\nNone\n7", [{"a": "None"}, {"a": "7"}]),
        (b"a,b\n", []),
        (b"", []),
    ],
)
def test_cells_are_texts(tmp_path: Path, text: bytes, rows: list[dict[str, object]]) -> None:
    (tmp_path / "a.csv").write_bytes(text)
    assert [row.fields for row in read(tmp_path / "a.csv") if isinstance(row, Row)] == rows


def test_bad_rows_of_a_table_are_told_and_the_next_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'a,b\n1,2\n1\n1,2,3\n\xff,2\n"x"y,2\n3,4\n5,"6\n7,8\n')
    found = read(file)
    assert [row.origin.row for row in found if isinstance(row, Row)] == [1, 6]
    assert bad(found) == [
        (2, "has 1 cells, while the header has 2"),
        (3, "has 3 cells, while the header has 2"),
        (4, f"is not valid UTF-8 (byte 0xff in `a`; {LATIN})"),
        (5, "is not valid CSV (',' expected after '\"'; lines 6 to 6 of the file)"),
        (7, "is not valid CSV (unexpected end of data; lines 8 to 9 of the file)"),
    ]


def test_a_header_names_each_column_once(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"a,b,a\n1,2,3\n")
    with pytest.raises(UserError, match=r"header of .*a\.csv has 'a' more than once"):
        read(file)
    file.write_bytes(b"a,\xff\n1,2\n")
    with pytest.raises(UserError, match="is not valid UTF-8"):
        read(file)
    file.write_bytes(b'"a')
    with pytest.raises(UserError, match=r"has no CSV header that can be read \(.*\)\.$"):
        read(file)


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": 2}]', '[\n{"a": 1},\n{"a": 2}\n]\n'])
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz"])
def test_an_array_under_a_name_of_lines_is_an_array(tmp_path: Path, name: str, text: str) -> None:
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = read(tmp_path / name)
    assert [row.fields for row in found if isinstance(row, Row)] == [{"a": 1}, {"a": 2}]


def test_lines_that_begin_with_a_list_are_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('[1, 2]\n{"a": 1}\n')
    found = read(tmp_path / "a.jsonl")
    assert bad(found) == [(1, "is a JSON list, not an object")]
    assert len(found) == 2


def test_an_array_is_read_element_by_element(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    rows: list[dict[str, object]] = [{"a": "\u4e16" * 3000, "n": i} for i in range(3000)]
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8-sig")
    size = file.stat().st_size
    tracemalloc.start()
    try:
        numbers = [row.fields["n"] for row in read_rows(DataSource(path=str(file)))
                   if isinstance(row, Row)]  # fmt: skip
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert numbers == list(range(3000))
    assert peak < size / 2
    broken = file.read_bytes()
    file.write_bytes(broken[: size // 2] + b"\xff" + broken[size // 2 :])
    found = read(file)
    ((row, reason),) = bad(found)
    assert row == len(found) > 1490
    place = re.search(r"is not valid UTF-8 \(byte (\d+)\)", reason)
    assert place is not None
    assert size // 2 - 2 < int(place[1]) <= size // 2 + 1


def test_what_follows_broken_syntax_in_an_array_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for text, at, what in (
        ('{"a": 1 "b": 2}', 8, "Expecting ',' delimiter"),
        ('{"a": nil}', 6, "Expecting value"),
        ('{"a": "two\nlines"}', 10, "Invalid control character at"),
    ):
        row = json.dumps({"a": "so" * 1000})
        before = "[" + f"{row},\n" * 1500
        file.write_text(before + text + f",\n{row}" * 10_000 + "]")
        tracemalloc.start()
        try:
            ((number, reason),) = bad(read(file))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert number == 1501
        assert f"is not valid JSON ({what}, character {len(before) + at + 1} of the text)" in reason
        assert peak < file.stat().st_size / 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv"])
def test_one_record_of_25_mb_is_read_in_a_few_times_its_size(tmp_path: Path, name: str) -> None:
    size = 25_000_000
    small: list[dict[str, object]] = [{"a": "so"}] * 300
    write(tmp_path / name, [*small, {"a": "long " * (size // 5)}, *small])
    tracemalloc.start()
    try:
        rows = read_rows(DataSource(path=str(tmp_path / name)))
        lengths = [len(str(row.fields["a"])) for row in rows if isinstance(row, Row)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lengths == [2] * 300 + [size] + [2] * 300
    assert peak < 10 * size  # the csv module takes four bytes a character


def test_arrays_of_every_split_into_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.data.sources import compression

    values: list[Any] = [
        {"a": [1, "\u4e16"]}, {}, {"b": -12.5e-30}, 123, "x", {"c": None, "d": True},
        {"e": float("-inf"), "f": '\U0001f600"\\\n'},
    ]  # fmt: skip
    file = tmp_path / "a.json"
    text = json.dumps(values, ensure_ascii=False, indent=1)
    file.write_text(text.replace("\U0001f600", "\\ud83d\\ude00"), encoding="utf-8")
    whole = read(file)
    assert [row.fields for row in whole if isinstance(row, Row)] == [
        value for value in values if isinstance(value, dict)
    ]
    assert [number for number, _ in bad(whole)] == [4, 5]
    for size in (1, 2, 3, 7):
        monkeypatch.setattr(compression, "_BLOCK", size)
        # What the file is said to be is seen in its first block.
        from tandem.data.sources.file_chunks import array_rows

        assert list(array_rows(file)) == whole


def test_folders_hold_arrow_and_compressed_files(tmp_path: Path) -> None:
    write(tmp_path / "train-0.arrow", ROWS)
    write(tmp_path / "train-1.jsonl.gz", ROWS)
    write(tmp_path / "test.csv.zst", ROWS[:1])
    (tmp_path / "notes.gz").write_bytes(b"not data")
    assert len(read(tmp_path)) == 6
    assert len(read(tmp_path, split="test")) == 1


def test_a_parquet_row_group_is_not_read_whole(tmp_path: Path) -> None:
    """One of 200 MB, in a process that says what it held."""
    import os
    import subprocess
    import sys

    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "big.parquet"
    rows = [os.urandom(8192).hex() for _ in range(12288)]
    table = pyarrow.table({"text": rows})
    pyarrow.parquet.write_table(table, file, compression="none", use_dictionary=False)
    assert pyarrow.parquet.read_metadata(file).num_row_groups == 1
    size = file.stat().st_size
    program = (
        "import pyarrow.parquet, re, sys\n"
        "from pathlib import Path\n"
        "from tandem.data.sources.file_chunks import file_chunks\n"
        "status = Path('/proc/self/status')\n"
        "held = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', status.read_text())[1]) * 1024\n"
        "before = held()\n"
        "count = sum(chunk.count for chunk in file_chunks(Path(sys.argv[1])))\n"
        "print(count, held() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True
    )
    count, grown = map(int, done.stdout.split())
    assert count == 12288
    assert grown < size / 2
