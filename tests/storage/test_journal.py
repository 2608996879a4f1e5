"""The journal of finished work: what is in it stays, whatever a kill or a power cut leaves."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from tandem.errors import UserError
from tandem.storage.journal import Journal, recorded


def filled(path: Path) -> bytes:
    with Journal(path, "k") as journal:
        journal.add([[0, "a"], [1, "b"]])
        journal.add([[2, "c\u2028\n"]])
    return path.read_bytes()


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "j.jsonl"
    filled(path)
    with Journal(path, "k") as journal:
        assert journal.entries == [[[0, "a"], [1, "b"]], [[2, "c\u2028\n"]]]
        journal.add([[3, "d"]])
    with Journal(path, "k") as journal:
        assert len(journal.entries) == 3
    assert json.loads(path.read_text().split("\n")[0]) == {"journal": "k", "checksums": True}


def test_cut_anywhere_it_keeps_every_whole_unit_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    whole = filled(path)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = max(0, sum(end <= cut for end in ends) - 1)
        with Journal(path, "k") as journal:
            assert len(journal.entries) == kept
            journal.add("next")
        with Journal(path, "k") as journal:
            assert len(journal.entries) == kept + 1
            assert journal.entries[-1] == "next"


def test_a_last_line_of_rubbish_is_cut_off_and_rubbish_within_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    whole = filled(path)
    path.write_bytes(whole + b"\0\0\0\n")
    with Journal(path, "k") as journal:
        assert len(journal.entries) == 2
    assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b"[[0,", b"[[0"))
    with pytest.raises(UserError, match=r"j.jsonl, line 2: damaged"):
        Journal(path, "k")


def test_other_work_is_refused_unless_nothing_was_done(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    Journal(path, "old").close()
    with Journal(path, "k") as journal:
        assert journal.entries == []
    filled(path)
    with pytest.raises(UserError, match="holds 2 finished units of other prompts"):
        Journal(path, "other")
    with Journal(path, "k") as journal:
        assert len(journal.entries) == 2


@pytest.mark.parametrize(
    "content", ["[1]\n[2]\n[3]\n", "[1]\n", '{"a": 1}\n', "my notes", "my notes\n", "\n{}\n", "1\n"]
)
def test_a_file_that_is_no_journal_is_refused_and_left_as_it_is(
    content: str, tmp_path: Path
) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"j.jsonl: no file of finished work"):
        Journal(path, "k")
    assert path.read_text() == content


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b'{"jou', b'{"journal": "\0\0\n'])
def test_what_is_left_of_a_journal_that_was_begun_is_begun_anew(
    content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(content)
    with Journal(path, "k") as journal:
        assert journal.entries == []
    assert path.read_text() == '{"journal": "k", "checksums": true}\n'


def test_recorded_values_are_not_worked_on_again(tmp_path: Path) -> None:
    path, told, asked = tmp_path / "j.jsonl", list[int](), list[frozenset[int]]()

    def work(done: Collection[int]) -> Iterator[list[tuple[int, int]]]:
        asked.append(frozenset(done))
        for number in range(4):
            if number not in done:
                yield [(number, number * 10)]
                if number == 1 and not done:
                    raise ConnectionError
        yield []

    with pytest.raises(ConnectionError):
        recorded(path, "k", work, told.append)
    assert recorded(path, "k", work, told.append) == {0: 0, 1: 10, 2: 20, 3: 30}
    assert recorded(path, "k", work, told.append) == {0: 0, 1: 10, 2: 20, 3: 30}
    assert asked == [frozenset(), frozenset({0, 1}), frozenset(range(4))]
    assert told == [0, 1, 1, 2, 1, 1, 0, 4, 0]
