"""The benchmark of first contact, on two commands and one round."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.apart import SideError

from benchmarks import first_contact

HELP, WRONG = "the help text", "plan of a file that is not there"


def test_a_page_has_seconds_and_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Instead of torch, so that all is over its limits.
    monkeypatch.setattr(first_contact, "_YARDSTICK", "print()")
    options = ["--repeats", "1", "--only", HELP, WRONG, "--save", "--results", str(tmp_path)]
    page = first_contact.main(options)
    assert page in capsys.readouterr().out
    assert (tmp_path / "first-contact.md").read_text() == page
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line[:2] == "| "]
    assert [row[0] for row in rows[1:]] == [WRONG, HELP]
    first, whole, after = (float(cell.split(" s, ")[0]) for cell in rows[1][1:])
    assert 0 < first <= whole
    assert after < whole
    assert "**over**" in rows[1][2]


def test_another_exit_code_or_mistake_ends_the_run(tmp_path: Path) -> None:
    case = next(case for case in first_contact.CASES if case.name == WRONG)
    for other in (replace(case, code=0), replace(case, words="no such stage")):
        with pytest.raises(SideError, match="no such file"):
            first_contact.measure(other, tmp_path)


def test_all_of_a_process_counts() -> None:
    assert first_contact.cpu_seconds(os.getpid()) > 0
