"""Files as editors, spreadsheets and downloads leave them: read, or named as what they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tandem.data.ledger import Ledger
from tandem.data.read_records import read_conversations
from tandem.data.sources.rows import BadLine, Row, read_rows
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

LINE = '{"prompt": "Why?", "completion": "So."}\n'
CELLS = "prompt,completion\nWhy?,So.\n"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0af3\nsize 12345\n"


def read(path: Path) -> list[Row | BadLine]:
    return list(read_rows(DataSource(path=str(path))))


def fields(path: Path) -> list[dict[str, object]]:
    return [row.fields for row in read(path) if isinstance(row, Row)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", LFS.encode(), "a Git LFS pointer, not the data. Fetch the data with `git lfs"),
        ("a.parquet", LFS.encode(), "a Git LFS pointer"),
        ("a.csv", LFS.encode(), "a Git LFS pointer"),
        ("a.json", b"\n<!DOCTYPE html><title>Log in</title>", "a web page"),
        ("a.parquet", b"<html>404</html>", "a web page"),
        ("a.jsonl.gz", b"<HTML>404</HTML>", "a web page"),
        ("a.jsonl", gzip.compress(LINE.encode()), "a gzip file. Let its name end in .gz."),
        ("a.csv", b"PK\x03\x04xlsx", "a ZIP archive or an office document. Unpack it"),
        ("a.parquet", b"PARE....PARE", "an encrypted Parquet file. Write it without"),
        ("a.json", b"PAR1....PAR1", "a Parquet file. Let its name end in .parquet."),
        ("a.parquet", b"ARROW1..", "an Arrow file"),
        ("a.jsonl.zst", gzip.compress(LINE.encode()), "a gzip file"),
        ("a.jsonl.gz", LINE.encode(), "plain JSON. Rename it to a.jsonl."),
        ("a.parquet", LINE.encode(), "plain JSON. Rename it to a name that ends in .jsonl"),
        ("a.jsonl", LINE.encode("utf-16"), r"UTF-16 text.*\(`iconv -f UTF-16 -t UTF-8 FILE"),
        ("a.jsonl", LINE.encode("utf-16-le"), "UTF-16 text"),
        ("a.tsv", CELLS.encode("utf-16"), "UTF-16 text"),
        ("a.json", LINE.encode("utf-32"), "UTF-32 text"),
        ("a.jsonl", (LINE * 3).replace("\n", "\r").encode(), "carriage returns alone. Save it"),
        ("a.csv", CELLS.replace("\n", "\r").encode(), "carriage returns alone"),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else_is_named_as_that(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is (an? )?.*{said.removeprefix('a ')}"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.csv", "sep=;\r\na;b\r\n1,5;2\r\n", [{"a": "1,5", "b": "2"}]),
        ("a.csv", '"sep=\t"\na\tb\n1\t2\n', [{"a": "1", "b": "2"}]),
        ("a.csv", '\ufeffa;b\n"x;\ny";2\n', [{"a": "x;\ny", "b": "2"}]),
        ("a.csv", "a\tb\n1\t2\n", [{"a": "1", "b": "2"}]),
        ("a.csv", "a|b\n1|2\n", [{"a": "1", "b": "2"}]),
        ("a.tsv", "a,b\n1,2\n", [{"a": "1", "b": "2"}]),
        ("a.csv", 'a,"b;c"\n1,2\n', [{"a": "1", "b;c": "2"}]),
        ("a.csv", ",a\n0,1\n", [{"column 1": "0", "a": "1"}]),
        ("a.csv", "a,b,,\n1,2,,\n", [{"a": "1", "b": "2", "column 3": "", "column 4": ""}]),
        ("a.json", '[\r{"a": 1},\r{"a": 2}\r]', [{"a": 1}, {"a": 2}]),
        ("a.jsonl", '\ufeff\n\r\n{"a": 1}\r\n \n{"a": 2}\r', [{"a": 1}, {"a": 2}]),
        ("A.JSONL", '{"a": NaN}'.replace("NaN", "1"), [{"a": 1}]),
    ],
)
def test_tables_and_lines_are_read_as_they_were_saved(
    tmp_path: Path, name: str, text: str, rows: list[dict[str, object]]
) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert fields(tmp_path / name) == rows


def test_the_lines_of_a_bad_row_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('sep=;\na;b\n1;2\n"x"y;2\n')
    (bad,) = [row for row in read(tmp_path / "a.csv") if isinstance(row, BadLine)]
    assert (bad.origin.row, "lines 4 to 4 of the file" in bad.reason) == (2, True)


def test_bytes_of_another_encoding_are_named_with_a_way_out(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", LINE + LINE.replace("So", "É")), ("a.csv", CELLS + "é,b\n")):
        (tmp_path / name).write_bytes(text.encode("cp1252"))
        (bad,) = [row for row in read(tmp_path / name) if isinstance(row, BadLine)]
        assert bad.origin.row == 2
        assert "0xc9" in bad.reason or "0xe9" in bad.reason
        assert "Latin-1 or Windows-1252, save it as UTF-8" in bad.reason


def test_records_under_a_key_are_pointed_at(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"version": 1, "data": [json.loads(LINE)] * 3}))
    with pytest.raises(UserError, match="But `data` holds a list of records: save that list alone"):
        list(read_conversations([DataSource(path=str(file))], Ledger(None)))
