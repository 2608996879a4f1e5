"""What the documents say about the tree is true: files, tests, links, example records."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from benchmarks.report import MARKS, readme_table

from tandem.data.formats import FORMATS, detect, read_question
from tandem.data.records import Origin
from tandem.recipe.schema import Recipe
from tandem.recipe.section import DataSource
from tandem.stages.sources import source_spec

from .pages import PAGES, ROOT, blocks, without_blocks

PACKAGE = ROOT / "src" / "tandem"
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def _layout() -> set[str]:
    """The paths of the README's tree; indentation says what lies in what."""
    (tree,) = (b for b in blocks(ROOT / "README.md", "") if b.text.startswith("src/tandem/"))
    paths: set[str] = set()
    folders: dict[int, str] = {}
    for line in tree.text.splitlines():
        name = line.split()[0]
        depth = len(line) - len(line.lstrip())
        assert line.split()[1:] or not depth, f"{name} has a name and nothing about it"
        above = "".join(folders[d] for d in sorted(folders) if d < depth)
        folders = {d: n for d, n in folders.items() if d < depth}
        if name.endswith("/"):
            folders[depth] = name
        paths.add(above + name)
    return paths


def _has_code(file: Path) -> bool:
    """Whether a module is more than a docstring."""
    body = ast.parse(file.read_text()).body
    return any(not isinstance(node, ast.Expr) for node in body)


def test_the_layout_names_every_module() -> None:
    modules = {
        str(file.relative_to(ROOT))
        for file in PACKAGE.rglob("*.py")
        if file.name != "__init__.py" or _has_code(file)
    }
    assert sorted(modules - _layout()) == []


def test_the_layout_names_nothing_that_is_not_there() -> None:
    assert sorted(path for path in _layout() if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(without_blocks(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in _anchors(file), f"{page.name} links to {target}"


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_tests_exist(page: Path) -> None:
    for file, name in _TEST.findall(page.read_text()):
        assert (ROOT / file).is_file(), f"{page.name} names {file}"
        assert not name or f"def {name}(" in (ROOT / file).read_text(), f"{page.name} names {name}"


def test_the_example_records_can_be_read() -> None:
    page = ROOT / "docs" / "data.md"
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
        "Alpaca preference", "implicit preference", "UltraFeedback", "question and answer",
    ]  # fmt: skip
    read_question(fields, origin)
    text = " ".join(page.read_text().split())
    for name in {known.name for known in FORMATS} - set(found):
        assert re.search(rf"{name}[,.]", text), name


def test_the_example_sources_can_be_said() -> None:
    block = blocks(ROOT / "docs" / "data.md", "yaml")[0]
    sources = [DataSource.model_validate(one) for one in yaml.safe_load(block.text)["data"]]
    assert [source_spec(source, source.path).meaning != {} for source in sources] == [True] * 3


def test_the_example_settings_are_those_of_recipes() -> None:
    examples = [yaml.safe_load(block.text) for block in blocks(ROOT / "docs" / "data.md", "yaml")]
    assert len(examples) > 2
    for example in examples[1:]:
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
