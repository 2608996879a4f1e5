"""Tables whose columns hold more than texts: what nobody reads costs nothing."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from tandem.data.ledger import Ledger
from tandem.data.read_records import read_conversations, read_pairs, read_questions
from tandem.data.sources import rows as sources
from tandem.data.text.contamination import read_other
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

N = 40


def text(values: list[bytes | None]) -> Any:
    """A column of texts that need not be UTF-8."""
    options = pc.CastOptions(target_type=pa.string(), allow_invalid_utf8=True)
    return pc.cast(pa.array(values, pa.binary()), options=options)


def questions() -> list[bytes]:
    return [b"Why %d?" % number for number in range(N)]


def answers() -> list[bytes]:
    return [b"Because of %d." % number for number in range(N)]


def write(path: Path, table: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=16)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
            out.write_table(table, max_chunksize=16)
    return path


def whole(path: Path | str, **said: Any) -> tuple[int, Ledger]:
    ledger = Ledger(None)
    source = DataSource(path=str(path), **said)
    return len(list(read_conversations([source], ledger, "drop"))), ledger


MANY: dict[str, Any] = {
    "broken text": text([b"ok"] * (N - 1) + [b"\xff"]),
    "date": pa.array([2**30] * N, pa.int32()).cast(pa.date32()),
    "timestamp": pa.array([2**52] * N, pa.int64()).cast(pa.timestamp("s")),
    "zone": pa.array([1] * N, pa.int64()).cast(pa.timestamp("us", tz="Mars/Olympus")),
    "nanoseconds": pa.array([1] * N, pa.int64()).cast(pa.timestamp("ns")),
    "duration": pa.array([2**52] * N, pa.int64()).cast(pa.duration("s")),
    "time": pa.array([datetime.time(1)] * N, pa.time64("ns")),
    "decimal": pa.array([1] * N).cast(pa.decimal256(70)),
    "half": pa.array([np.float16(1.5)] * N, pa.float16()),
    "huge": pa.array([2**64 - 1] * N, pa.uint64()),
    "words": pa.array(["a", "b"] * (N // 2)).dictionary_encode(),
    "map": pa.array([[("a", 1), ("a", 2)]] * N, pa.map_(pa.string(), pa.int64())),
    "null": pa.nulls(N),
    "fixed": pa.array([[1, 2]] * N, pa.list_(pa.int8(), 2)),
    "binary": pa.array([b"\x89PNG"] * N, pa.binary(4)),
    "struct": pa.array([{"a": None, "b": [None]}] * N),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * N, pa.binary(16))),
}
ARROW_ONLY: dict[str, Any] = {
    "interval": pa.array([(1, 2, 3)] * N, pa.month_day_nano_interval()),
    "views": pa.array([["a"]] * N, pa.list_view(pa.string())),
    "view": pa.array([b"a"] * N, pa.binary_view()),
    "runs": pa.RunEndEncodedArray.from_arrays(pa.array([N], pa.int32()), pa.array(["x"])),
    "union": pa.UnionArray.from_sparse(
        pa.array([0, 1] * (N // 2), pa.int8()), [pa.array([1] * N), pa.array(["x"] * N)]
    ),
}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_no_column_that_nobody_reads_costs_a_record(tmp_path: Path, kind: str) -> None:
    more = MANY if kind == "parquet" else {**MANY, **ARROW_ONLY}
    table = pa.table({"prompt": text([*questions()]), "completion": text([*answers()]), **more})
    count, ledger = whole(write(tmp_path / f"a.{kind}", table))
    (unread,) = ledger.unread.values()
    assert (count, ledger.counts["dropped"], unread) == (N, 0, tuple(sorted(more)))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_record_of_broken_text_is_named_or_dropped(tmp_path: Path, kind: str) -> None:
    broken: list[bytes | None] = [*answers()]
    broken[17] = b"Un caf\xe9."
    good = text([*answers()])
    asked = text([*questions()])
    file = write(tmp_path / f"a.{kind}", pa.table({"prompt": asked, "completion": text(broken)}))
    said = rf"a\.{kind}, row 18: .*`completion` a value that is not valid UTF-8 \(byte 7\)"
    with pytest.raises(UserError, match=said):
        list(read_conversations([DataSource(path=str(file))], Ledger(None)))
    count, ledger = whole(file)
    ((row, reason),) = [(entry.row, entry.reason) for entry in ledger.entries]
    assert (count, row, reason) == (N - 1, 18, "unparsable")
    # Under the data's own names, too.
    named = write(tmp_path / f"b.{kind}", pa.table({"ask": asked, "reply": text(broken)}))
    fields = {"completion": "reply", "prompt": "ask"}
    count, ledger = whole(named, fields=fields)
    assert (count, [entry.row for entry in ledger.entries]) == (N - 1, [18])
    pairs = pa.table({"prompt": asked, "chosen": good, "rejected": text(broken)})
    source = DataSource(path=str(write(tmp_path / f"c.{kind}", pairs)))
    with pytest.raises(UserError, match="row 18"):
        list(read_pairs([source], Ledger(None)))
    other = pa.table({"question": asked, "answer": text(broken)})
    source = DataSource(path=str(write(tmp_path / f"d.{kind}", other)))
    with pytest.raises(UserError, match=r"row 18: .*`answer` a value that is not valid UTF-8"):
        read_questions([source])
    assert read_other(source).unreadable == 1


def test_labelled_rows_of_broken_text_are_named(tmp_path: Path) -> None:
    asked = [question for question in questions()[: N // 2] for _ in range(2)]
    replies: list[bytes | None] = [*answers()]
    replies[17] = b"\xff"
    table = pa.table(
        {
            "prompt": text([*asked]),
            "completion": text(replies),
            "label": [True, False] * (N // 2),
        }
    )
    ledger = Ledger(None)
    source = DataSource(path=str(write(tmp_path / "kto.parquet", table)))
    assert len(list(read_pairs([source], ledger, "drop"))) == N // 2 - 1
    assert ("unparsable", 18) in {(entry.reason, entry.row) for entry in ledger.entries}


def test_what_a_turn_holds_beside_its_text_costs_nothing(tmp_path: Path) -> None:
    def turns(content: list[bytes | None], source: list[bytes | None]) -> Any:
        role = pa.array(["user", "assistant"] * (N // 2))
        parts = [role, text(content), text(source)]
        struct = pa.StructArray.from_arrays(parts, ["role", "content", "source"])
        return pa.table({"messages": pa.ListArray.from_arrays(range(0, N + 1, 2), struct)})

    broken: list[bytes | None] = [*answers()]
    broken[17] = b"\xe9"
    table = turns([*answers()], broken)
    assert whole(write(tmp_path / "beside.parquet", table))[0] == N // 2
    table = turns(broken, [*answers()])
    count, ledger = whole(write(tmp_path / "within.parquet", table))
    (entry,) = ledger.entries
    assert (count, entry.row) == (N // 2 - 1, 9)
    assert "`messages[1].content` a value that is not valid UTF-8" in entry.detail


def test_columns_of_one_name_cost_only_who_reads_them(tmp_path: Path) -> None:
    asked, replies = text([*questions()]), text([*answers()])
    names = ["prompt", "completion", "note", "note"]
    table = pa.Table.from_arrays([asked, replies, asked, replies], names)
    assert whole(write(tmp_path / "a.arrow", table))[0] == N
    table = pa.Table.from_arrays([asked, replies, asked], ["prompt", "completion", "prompt"])
    source = DataSource(path=str(write(tmp_path / "b.arrow", table)))
    with pytest.raises(UserError, match="stands in more than one column of this name"):
        list(read_conversations([source], Ledger(None)))


def test_a_damaged_page_costs_its_column(tmp_path: Path) -> None:
    note = pa.array([b"%064d" % number for number in range(N)])
    columns = {"prompt": text([*questions()]), "completion": text([*answers()]), "note": note}
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), file, compression="zstd", use_dictionary=False)
    place = pq.read_metadata(file).row_group(0).column(2)
    content = bytearray(file.read_bytes())
    start = place.data_page_offset + place.total_compressed_size // 2
    content[start : start + 20] = bytes(20)
    file.write_bytes(content)
    assert whole(file)[0] == N
    place = pq.read_metadata(file).row_group(0).column(1)
    start = place.data_page_offset + place.total_compressed_size // 2
    content[start : start + 20] = bytes(20)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet, row 1: .*`completion` a value that cannot"):
        list(read_conversations([DataSource(path=str(file))], Ledger(None)))


def test_tables_without_rows_are_empty(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "completion": ["b"]}).slice(0, 0)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(UserError, match="is empty"):
            whole(write(tmp_path / name, table))


@pytest.fixture
def pictures() -> Any:
    from datasets import Audio, Dataset, Image

    rows = [{"prompt": f"Why {n}?", "completion": f"So {n}."} for n in range(N)]
    bare = [{"bytes": b"\x89PNG", "path": None}] * N
    table = Dataset.from_list(rows).add_column("cover", bare).add_column("voice", bare)
    return table.cast_column("cover", Image()).cast_column("voice", Audio())


def test_columns_that_have_to_be_decoded_are_not(
    pictures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    datasets.disable_progress_bars()
    pictures.save_to_disk(str(tmp_path / "saved"))
    count, ledger = whole(tmp_path / "saved")
    assert (count, ledger.unread) == (N, {str(tmp_path / "saved"): ("cover", "voice")})
    monkeypatch.setattr(sources, "_hub_table", lambda *_: pictures)
    assert whole("owner/pictures")[0] == N
    _, ledger = whole("owner/pictures", fields={"prompt": "cover"})
    assert {entry.reason for entry in ledger.entries} == {"`prompt` is not a text"}
