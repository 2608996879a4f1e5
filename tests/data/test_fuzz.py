"""Inputs that nobody thought of: every row is a record or has a reason, every file an account."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.data.formats import FORMATS, Unusable, detect
from tandem.data.ledger import Ledger
from tandem.data.reading import read_conversations, read_pairs
from tandem.data.records import Conversation, Origin, PreferencePair
from tandem.data.sources import SourceSpec
from tandem.errors import UserError

BOM = codecs.BOM_UTF8
ORIGIN = Origin("made.jsonl", 1)
KEYS = sorted({key for known in FORMATS for key in known.keys} | {"system", "input"})
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


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ROWS)
def test_a_row_is_a_record_or_has_a_reason(row: dict[str, Any]) -> None:
    known = detect(row)
    assert (known is None) == (not any(f.keys <= row.keys() for f in FORMATS))
    if known is None:
        return
    try:
        record = known.read(row, ORIGIN)
    except Unusable:
        return
    if isinstance(record, Conversation):
        assert record.turns[-1].role == "assistant"
        assert record.turns[-1].content.strip() or record.turns[-1].calls
    else:
        assert isinstance(record, PreferencePair)
        assert record.chosen.strip() != record.rejected.strip()
        assert record.prompt[-1].role == "user"


LINES = st.one_of(
    st.binary(max_size=40).filter(lambda line: b"\n" not in line and b"\r" not in line),
    ROWS.map(lambda row: json.dumps(row).encode()),
    st.just(
        b'{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}'
    ),
    st.just(b'{"question": "Q", "chosen": "C", "rejected": "R"}'),
    st.just(b""),
)


@pytest.mark.parametrize("read", [read_conversations, read_pairs])
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(lines=st.lists(LINES, max_size=8))
def test_a_file_is_read_or_refused(read: Any, lines: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "made.jsonl"
    path.write_bytes(b"\n".join(lines))
    for on_bad_record in ("stop", "drop"):
        ledger, said, records = Ledger(), "", []
        try:
            records = list(read([SourceSpec(str(path))], ledger, on_bad_record))
        except UserError as error:
            said = str(error)
        if said:
            assert "made.jsonl" in said
            continue
        rows = [record.origin.row for record in records] + [e.row for e in ledger.entries]
        text = b"\n".join(lines).removeprefix(BOM).split(b"\n")
        filled = [n for n, line in enumerate(text, start=1) if line.strip()]
        # No row is lost, and none counted twice.
        assert sorted(rows) == filled
