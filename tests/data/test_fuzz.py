"""Inputs that nobody thought of: every row is a record or has a reason, every file an account."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.data.formats.format import InvalidRecord
from tandem.data.formats.known_formats import FORMATS, detect
from tandem.data.ledger import Ledger
from tandem.data.read_records import read_conversations, read_pairs
from tandem.data.records import Conversation, Origin, Preference
from tandem.data.sources.chunks import Renaming, Row
from tandem.data.sources.compression import check_signature
from tandem.data.sources.rows import read_rows
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

BOM = codecs.BOM_UTF8
ORIGIN = Origin("made.jsonl", 1)
KEYS = sorted({key for known in FORMATS for key in known.keys | known.optional})
WORDS = ["", " ", "Q", "\n\nHuman: Q\n\nAssistant: A", "user", "assistant", "system", "\ud800"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS)
SCALARS |= st.text(max_size=8)
TURN = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "weight", "type", "text"]), SCALARS
)
VALUES = st.recursive(
    SCALARS | st.lists(TURN, max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
ROWS = st.dictionaries(st.sampled_from(KEYS), VALUES)
# Rows of one format, as they are meant to be and with anything in their places.
SAID = st.sampled_from(["Q", "A", "B", ""]) | VALUES
ANSWERS = st.fixed_dictionaries(
    {"response": SAID},
    optional={
        "overall_score": SCALARS,
        "fine-grained_score": SCALARS,
        "annotations": st.dictionaries(
            st.text(max_size=2), st.fixed_dictionaries({"Rating": SCALARS}) | SCALARS, max_size=3
        ),
    },
)
SCORED = st.fixed_dictionaries(
    {"instruction": SAID, "completions": st.lists(ANSWERS | SCALARS, max_size=4) | VALUES}
)
LABELLED = st.fixed_dictionaries(
    {"prompt": SAID, "completion": SAID, "label": st.booleans() | SCALARS}
)
BOUNDED = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(ROWS | SCORED | LABELLED)
def test_a_row_is_a_record_or_has_a_reason(row: dict[str, Any]) -> None:
    known = detect(row)
    assert (known is None) == (not any(f.fits(row) for f in FORMATS))
    if known is None:
        return
    for one in FORMATS:
        if one.keys != known.keys:
            continue
        try:
            found = one.read(row, ORIGIN)
        except InvalidRecord as reason:
            found = [reason]
        assert found
        for record in found:
            if isinstance(record, Conversation):
                assert record.turns[-1].role == "assistant"
                assert record.turns[-1].content.strip() or record.turns[-1].calls
            elif isinstance(record, Preference):
                assert record.chosen.strip() != record.rejected.strip()
                assert record.prompt[-1].role == "user"
            else:
                assert record.reason


LINES = st.one_of(
    st.binary(max_size=40).filter(lambda line: b"\n" not in line and b"\r" not in line),
    ROWS.map(lambda row: json.dumps(row).encode()),
    st.just(
        b'{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}'
    ),
    st.just(b'{"question": "Q", "chosen": "C", "rejected": "R"}'),
    st.just(b""),
)


def are_lines(lines: list[bytes]) -> bool:
    """Whether a file of these is no single array."""
    return not b"\n".join(lines).removeprefix(BOM).lstrip().startswith(b"[")


def filled(lines: list[bytes]) -> list[int]:
    """The numbers of the lines that are records."""
    text = b"\n".join(lines).removeprefix(BOM).split(b"\n")
    return [number for number, line in enumerate(text, start=1) if line.strip()]


@pytest.mark.parametrize("read", [read_conversations, read_pairs])
@settings(BOUNDED, max_examples=30)
@given(lines=st.lists(LINES, max_size=8).filter(are_lines))
def test_a_file_is_read_or_refused(read: Any, lines: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "made.jsonl"
    path.write_bytes(b"\n".join(lines))
    for on_bad_record in ("stop", "drop"):
        ledger, said, records = Ledger(), "", []
        try:
            records = list(read([DataSource(path=str(path))], ledger, on_bad_record))
        except UserError as error:
            said = str(error)
        if said:
            assert "made.jsonl" in said
            continue
        rows = [record.origin.row for record in records] + [e.row for e in ledger.entries]
        # No row is lost, and none counted twice.
        assert sorted(rows) == filled(lines)


@BOUNDED
@given(content=st.binary(max_size=60))
def test_any_array_is_read_or_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    path.write_bytes(b'[{"question": "Q", "chosen": "C", "rejected": "R"}' + content)
    ledger = Ledger()
    rows = [one.origin.row for one in read_pairs([DataSource(path=str(path))], ledger, "drop")]
    rows += [entry.row for entry in ledger.entries]
    assert sorted(rows) == list(range(1, len(rows) + 1))
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        assert ledger.entries
    else:
        assert len(whole) == len(rows)


def account(source: DataSource, read: Any) -> tuple[list[int], list[int], str] | None:
    """Rows of records, rows of ledger entries and the last detail; None if the file is refused."""
    ledger = Ledger()
    try:
        rows = [record.origin.row for record in read([source], ledger, "drop")]
    except UserError:
        return None
    entries = sorted(ledger.entries, key=lambda entry: entry.row)
    return rows, [entry.row for entry in entries], entries[-1].detail if entries else ""


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@BOUNDED
@given(
    lines=st.lists(LINES, max_size=8).filter(are_lines),
    cut=st.floats(0, 1),
    rubbish=st.binary(max_size=3),
)
def test_a_compressed_file_is_read_as_far_as_it_goes(
    suffix: str, lines: list[bytes], cut: float, rubbish: bytes, tmp_path: Path
) -> None:
    plain, packed = tmp_path / "made.jsonl", tmp_path / f"made.jsonl{suffix}"
    plain.write_bytes(b"\n".join(lines))
    whole = packed_as(suffix, plain.read_bytes())
    packed.write_bytes(whole)
    # Only a plain file is refused for looking like a web page or another kind of file.
    if not looks_foreign(plain):
        expected = account(DataSource(path=str(plain)), read_pairs)
        assert account(DataSource(path=str(packed)), read_pairs) == expected
    # Bytes in the middle may change unseen: zstd need not have a checksum.
    for damaged in (whole[: int((len(whole) - 1) * cut)], whole + rubbish):
        packed.write_bytes(damaged)
        found = account(DataSource(path=str(packed)), read_pairs)
        if found is None or damaged.rstrip(b"\0") == whole.rstrip(b"\0"):
            continue
        rows, entries, last = found
        assert len(rows + entries) == len({*rows, *entries})
        assert "what follows cannot be read" in last


def looks_foreign(file: Path) -> bool:
    """Whether a file is refused for how it begins."""
    try:
        check_signature(file)
    except UserError:
        return True
    return False


def packed_as(suffix: str, content: bytes) -> bytes:
    """Content as gzip or zstd."""
    if suffix == ".gz":
        return gzip.compress(content)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


CELLS = st.text('ab"\n\r,\t \u4e16', max_size=6)


@BOUNDED
@given(rows=st.lists(st.tuples(CELLS, CELLS), max_size=6), tabs=st.booleans())
def test_what_a_writer_of_tables_writes_is_read(
    rows: list[tuple[str, str]], tabs: bool, tmp_path: Path
) -> None:
    path = tmp_path / ("made.tsv" if tabs else "made.csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_ALL)
        table.writerows([("a", "b"), *rows])
    found = list(read_rows(DataSource(path=str(path))))
    assert [row.fields for row in found if isinstance(row, Row)] == [
        {"a": a, "b": b} for a, b in rows
    ]
    assert [row.origin.row for row in found] == list(range(1, len(rows) + 1))


@BOUNDED
@given(content=st.binary(max_size=60))
def test_any_bytes_are_a_table(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "made.csv"
    path.write_bytes(b"prompt,completion,label\nQ,A,true\n" + content)
    found = account(DataSource(path=str(path)), read_conversations)
    assert found is not None
    rows, entries, _ = found
    assert rows[0] == 1
    assert sorted(rows + entries) == list(range(1, 1 + len(rows) + len(entries)))


@BOUNDED
@given(rows=st.lists(LABELLED, min_size=1, max_size=8))
def test_labelled_rows_are_pairs_or_have_a_reason(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "made.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = Ledger()
    pairs = list(read_pairs([DataSource(path=str(path))], ledger))
    together = sum(entry.reason in TWO_ROWS for entry in ledger.entries)
    assert 2 * len(pairs) + len(ledger.entries) + together == len(rows)


# What is wrong with two answers that are good enough alone.
TWO_ROWS = ("identical answers", "chosen and rejected follow different prompts")


@BOUNDED
@given(rows=st.lists(SCORED, min_size=1, max_size=4))
def test_every_scored_answer_is_in_a_pair_or_has_a_reason(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "made.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = Ledger()
    source = DataSource(path=str(path), completions="best_vs_rest")
    told = [record.origin.row for record in read_pairs([source], ledger)]
    told += [entry.row for entry in ledger.entries]
    assert set(told) == set(range(1, len(rows) + 1))
    for number, row in enumerate(rows, start=1):
        # A whole row has one reason, otherwise every answer but the best has its own.
        answers = row["completions"]
        each = len(answers) - 1 if isinstance(answers, list) else 1
        assert told.count(number) in (1, each)


NAMES = st.sampled_from([*KEYS, "role", "content", "own", "a.b", ""])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    row=ROWS,
    names=st.dictionaries(NAMES, NAMES, max_size=3),
    roles=st.dictionaries(st.sampled_from(WORDS), st.sampled_from(["user", "assistant"])),
)
def test_any_row_can_be_renamed(
    row: dict[str, Any], names: dict[str, str], roles: dict[str, str]
) -> None:
    renaming = Renaming(tuple(names.items()), tuple(roles.items()))
    before = repr(row)
    renamed = renaming.apply(row)
    missing, unheard = renaming.unused(row)
    assert repr(row) == before
    assert missing <= set(names.values())
    assert unheard <= set(roles)
    for key, name in names.items():
        if key not in ("role", "content"):
            assert (key in renamed) == (name in row)
