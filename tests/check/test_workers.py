"""Worker processes find what one process finds, in the same words and the same order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tandem.check import inspect_chunk
from tandem.check.check_page import as_json
from tandem.check.findings import Sign, Tally
from tandem.check.survey import survey
from tandem.check.survey_result import CheckTarget, Survey
from tandem.check.unread_keys import UnreadKeys
from tandem.data.encoded import worker_pool
from tandem.data.encoded.encode_chunk import EncodingOptions, FitRecord, fit_records
from tandem.data.encoded.worker_pool import EncodingWork
from tandem.data.formats.format import Kind, Record
from tandem.data.records import Origin
from tandem.data.text.contamination import read_other
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.truncation.limits import Limits
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

from ..data.test_pool import NEW
from .made_data import conversation, pair, write
from .test_survey import CONVERSATIONS, PAIRS, SENTENCE


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let small data be large; the sizes of the pools that were started."""
    monkeypatch.setattr("tandem.data.encoded.worker_pool._FEW", 2)
    monkeypatch.setattr("tandem.data.sources.file_chunks._ROWS", 24)
    sizes: list[int] = []

    class Counted(worker_pool.Pool[Any]):
        def __init__(self, setup: Any, count: int) -> None:
            sizes.append(count)
            super().__init__(setup, count)

    monkeypatch.setattr("tandem.data.encoded.worker_pool.Pool", Counted)
    return sizes


def _rows(kind: Kind) -> list[Any]:
    """Faults of each kind in several chunks, and keys that nothing reads."""
    planted = CONVERSATIONS if kind == "conversations" else PAIRS
    make: Any = conversation if kind == "conversations" else pair
    rows: list[Any] = [{**make(seed), f"key{seed % 7}": 1} for seed in range(150)]
    for turn in range(4):
        for number, row in enumerate(planted.values()):
            rows.insert(11 + 37 * turn + 2 * number, row)
    rows[90] = "{not json"
    return rows


def _found(file: Path, kind: Kind, chat: ChatTokenizer | None, workers: int, other: Path) -> Survey:
    plan = EncodingOptions(kind, Limits(250, None), "stop")
    target = CheckTarget(
        None, (DataSource(path=str(file)),), plan, 0.5,
        chat=chat, special=("<s>", "</s>"), limited=chat is not None,
    )  # fmt: skip
    work = EncodingWork(workers=workers)
    return survey(
        target, others=[read_other(DataSource(path=str(other)))], shown=5, encoding_work=work
    )


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("kind", ["conversations", "preference pairs"])
def test_workers_find_what_one_process_finds(
    kind: Kind, encoded: bool, tmp_path: Path, stories_tokenizer: Any, pools: list[int]
) -> None:
    file = write(tmp_path / "a.jsonl", _rows(kind))
    pairs = kind == "preference pairs"
    answer = pair(149)["chosen"] if pairs else conversation(149)["messages"][1]["content"]
    other = write(tmp_path / "b.jsonl", [*_rows(kind)[30:60], {"text": answer}])
    template = resolve_template(stories_tokenizer, "neural-chat")
    chat = ChatTokenizer.of(stories_tokenizer, template) if encoded else None
    one, two, three = (_found(file, kind, chat, workers, other) for workers in (1, 2, 3))
    assert pools == [2, 3]
    assert as_json(one) == as_json(two) == as_json(three)
    planted = CONVERSATIONS if kind == "conversations" else PAIRS
    names = {finding.sign.name for finding in one.findings}
    # Copies of a planted record are repeated as such.
    expected = set(planted) - {"duplicate_prompts", "duplicate_answers", "pairs_contradict"}
    assert expected | {"shared_prompts", "shared_words", "exact_duplicates"} <= names
    assert set(one.unread) >= {f"key{number}" for number in range(7)}
    assert one.problem is not None
    assert "row 91: the record is not valid JSON" in one.problem
    assert (one.counts["truncated"] > 0) == encoded


def test_a_later_tally_adds_to_an_earlier_one() -> None:
    sign = Sign("some", "some thing", "note", "Look.")
    together, parts = Tally(3), (Tally(3), Tally(3))
    for row in range(8):
        kind = "abc"[row % 3]
        for tally in (together, parts[row // 2 > 0]):
            tally.add(sign, Origin("f", row), f"text {row}", kind=kind)
    parts[0].merge(parts[1])
    of = {"records": 8}
    assert parts[0].findings(of) == together.findings(of)
    assert [row.row for row in together.findings(of)[0].rows] == [0, 1, 2]


def test_later_keys_add_to_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.check.unread_keys._MOST", 4)
    first, later = UnreadKeys(), UnreadKeys()
    for key in "ba":
        first.add(key)
    for key in "adc":
        later.add(key)
    first.merge(later)
    assert (first.listed, first.cut) == (("a", "b", "c", "d"), False)
    for key in "eab":
        later.add(key)
    first.merge(later)
    assert (first.listed, first.cut) == (("a", "b", "c", "d"), True)


def test_what_cannot_be_measured_whole_ends_the_pass(
    tmp_path: Path, mistral_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a token without a row in the part of a text that a run would cut off."""

    def failing(
        chat: ChatTokenizer, plan: EncodingOptions, records: Sequence[Record]
    ) -> list[FitRecord]:
        if records and plan.limits.sequence == inspect_chunk._COUNTED:
            raise UserError(f"{records[0].origin}: there is no row for it.")
        return fit_records(chat, plan, records)

    monkeypatch.setattr("tandem.check.inspect_chunk.fit_records", failing)
    rows = [conversation(seed) for seed in range(5)]
    rows[2]["messages"][1]["content"] = SENTENCE * 300
    file = write(tmp_path / "a.jsonl", rows)
    template = resolve_template(mistral_tokenizer, "neural-chat")
    chat = ChatTokenizer.of(mistral_tokenizer, template)
    found = _found(file, "conversations", chat, 1, file)
    assert found.problem == f"{file}, row 3: there is no row for it."
    assert found.counts == {"read": 5, "trained": 5, "truncated": 1, "dropped": 0}
    assert found.histogram is not None
    assert sum(found.histogram.counts) == 4
    assert "exact_duplicates" not in {finding.sign.name for finding in found.findings}


def test_workers_do_without_torch_transformers_and_pydantic() -> None:
    code = (
        "import sys, tandem.check.inspect_chunk;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=NEW).returncode == 0
