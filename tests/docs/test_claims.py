"""The page of claims is current, and every claim has a test."""

from __future__ import annotations

import pytest

from .claims import COMMAND, PAGE, Section, find_test, page, sections
from .pages import ROOT


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), f"run: {COMMAND}"


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.title)
def test_every_claim_has_tests_and_belongs_to_a_page(section: Section) -> None:
    assert (ROOT / "docs" / section.page).is_file()
    assert section.claims
    for claim in section.claims:
        assert [find_test(name) for name in claim.tests], f"no test shows: {claim.text}"
        assert claim.text[-1] in ".)"


@pytest.mark.parametrize("name", ["test_no_such_test", "test_no_such_file.py"])
def test_a_name_without_a_test_is_an_error(name: str) -> None:
    with pytest.raises(LookupError, match=f"{name} .* is no test"):
        find_test(name)


def test_a_name_of_several_tests_is_an_error_that_lists_them() -> None:
    with pytest.raises(LookupError, match=r"tests/peers/test_dpo.py::\w+ and tests/peers/test_sft"):
        find_test("test_a_short_run_equals_a_plain_loop")
