"""What the documents say is true: links, tests, example records, measured ratios."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from benchmarks.tables import MARKS, readme_table

from tandem.data.formats.conversations import read_question
from tandem.data.formats.known_formats import FORMATS, detect
from tandem.data.records import Origin
from tandem.recipe.data_source import DataSource
from tandem.recipe.recipe import Recipe

from .pages import PAGES, ROOT, blocks, page_name, without_blocks

GUIDE = ROOT / "docs" / "guide"
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([\w/]+/[\w/]*(?:\.py|\.c|/))`")
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_the_index_links_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target).resolve() for target in _LINK.findall(index.read_text())}
    assert {page_name(page) for page in PAGES[2:] if page != index and page not in linked} == set()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(without_blocks(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page_name(page)} links to {target}"
        assert not anchor or anchor in _anchors(file), f"{page_name(page)} links to {target}"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_tests_exist_and_the_guide_names_none(page: Path) -> None:
    named = _TEST.findall(page.read_text())
    assert not named or page.parent.name == "internals" or page.name == "CONTRIBUTING.md"
    for file, test in named:
        assert (ROOT / file).is_file(), f"{page_name(page)} names {file}"
        assert not test or f"def {test}(" in (ROOT / file).read_text(), (
            f"{page_name(page)} names {test}"
        )


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_code_exists_and_the_guide_names_none(page: Path) -> None:
    """A path of code is written from the repository or from src/tandem."""
    named = set(_CODE.findall(without_blocks(page)))
    assert not named or page.parent.name != "guide"
    roots = (ROOT, ROOT / "src" / "tandem")
    assert {path for path in named if not any((root / path).exists() for root in roots)} == set()


def test_the_example_records_can_be_read() -> None:
    page = GUIDE / "data.md"
    found = []
    for block in blocks(page, "json"):
        fields, origin = json.loads(block.text), Origin("data.md", 1)
        known = detect(fields)
        assert known
        known.read(fields, origin)
        found.append(known.name)
    assert found == [
        "ShareGPT", "messages", "messages", "messages", "Alpaca", "prompt and completion",
        "unpaired preference",
        "orca_dpo_pairs", "explicit preference", "explicit preference", "ShareGPT preference",
        "Alpaca preference", "implicit preference", "UltraFeedback", "scored answers",
        "raw text", "tokens", "token pairs", "question and answer",
    ]  # fmt: skip
    read_question(fields, origin)
    text = " ".join(page.read_text().split())
    for name in {known.name for known in FORMATS} - set(found):
        assert re.search(rf"{name}[,.]", text), name


def test_the_example_sources_can_be_said() -> None:
    (block,) = blocks(GUIDE / "data.md", "yaml")
    sources = [DataSource.model_validate(one) for one in yaml.safe_load(block.text)["data"]]
    assert [source.meaning != {} for source in sources] == [True] * 3


def test_the_example_settings_are_those_of_recipes() -> None:
    pages = [GUIDE / f"{name}.md" for name in ("templates", "training-data")]
    examples = [yaml.safe_load(block.text) for page in pages for block in blocks(page, "yaml")]
    assert len(examples) == 4
    for example in examples:
        given = {"name": "x", "model": "m", "output_dir": "o", "sft": {}} | example
        given["sft"] = {"data": "d.jsonl"} | given["sft"]
        Recipe.model_validate(given)


def _how_fast() -> str:
    return (ROOT / "README.md").read_text().partition("## How fast")[2].partition("\n## ")[0]


def _rounded(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2f}x"


def _measured_ratios() -> set[str]:
    """Ratios that the results state, and those of tandem's row to the others of its table."""
    found = set()
    for page in (ROOT / "benchmarks" / "results").glob("*.md"):
        text = page.read_text()
        found |= {_rounded(float(ratio)) for ratio in re.findall(r"\b([\d.]+)x", text)}
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
        ours: list[str] = next((row for row in rows if row[0] == "tandem"), [])
        for row in rows:
            for one, other in zip(ours[1:], row[1:], strict=False):
                numbers = [re.match(r"[\d.]+(?= \(|$)", cell) for cell in (one, other)]
                if all(numbers):
                    mine, theirs = (float(number.group()) for number in numbers if number)
                    found.add(_rounded(mine / theirs))
    return found


def test_every_ratio_of_the_readme_was_measured() -> None:
    quoted = set(re.findall(r"\b([\d.]+x)", _how_fast()))
    assert len(quoted) >= 5
    assert sorted(quoted - _measured_ratios()) == []


def test_the_readmes_table_is_that_of_the_results() -> None:
    """Once a run has left its JSON; `python -m benchmarks.report --readme` writes the table."""
    first, last = MARKS
    quoted = _how_fast().partition(first)[2].partition(last)[0].strip()
    assert quoted.startswith("| tandem against |")
    table = readme_table()
    assert table is None or quoted == table
