"""The page of claims: what the documents promise, and the tests that show it.

`python -m tests.docs.claims > docs/internals/claims.md` writes the page from claims.yaml.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from .pages import ROOT

TABLE = Path(__file__).with_name("claims.yaml")
PAGE = ROOT / "docs" / "internals" / "claims.md"
COMMAND = "python -m tests.docs.claims > docs/internals/claims.md"

_INTRODUCTION = f"""\
# Claims and their tests

<!-- Made by `{COMMAND}`; edit tests/docs/claims.yaml instead. -->

What the documents promise, and which test shows it. To run one:
`python -m pytest FILE::TEST`.
"""


@dataclass(frozen=True)
class Claim:
    """One sentence, and the tests that show it as the table names them."""

    text: str
    tests: list[str]


@dataclass(frozen=True)
class Section:
    """The claims about one subject of a page; `page` is relative to docs/."""

    page: str
    title: str
    claims: list[Claim]


def sections() -> list[Section]:
    """Return the table's sections in order."""
    return [
        Section(one["page"], one["title"], [Claim(c["claim"], c["tests"]) for c in one["claims"]])
        for one in yaml.safe_load(TABLE.read_text())
    ]


def find_test(name: str) -> str:
    """Return the one test that a name means, as pytest takes it: `tests/FILE.py[::FUNCTION]`.

    Raises LookupError where no test or more than one has the name.
    """
    file, _, function = name.rpartition("::")
    if name.endswith(".py"):
        found = [path for path in _functions() if f"/{path}".endswith(f"/{name}")]
    else:
        found = [
            f"{path}::{function}"
            for path, functions in _functions().items()
            if function in functions and f"/{path}".endswith(f"/{file}.py" if file else ".py")
        ]
    if len(found) != 1:
        raise LookupError(f"{name} of {TABLE.name} is {' and '.join(found) or 'no test'}")
    return found[0]


@cache
def _functions() -> dict[str, set[str]]:
    """The test functions of each test file."""
    return {
        path.relative_to(ROOT).as_posix(): set(
            re.findall(r"^\s*def (test_\w+)\(", path.read_text(), re.MULTILINE)
        )
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
    }


def page() -> str:
    """Return docs/internals/claims.md."""
    parts = [_INTRODUCTION]
    for section in sections():
        link = "../" + section.page if section.page.startswith("guide/") else section.page[10:]
        parts.append(f"## {section.title}\n\nOf [{section.page}]({link}).\n")
        parts.append("\n".join(_lines(claim) for claim in section.claims) + "\n")
    return "\n".join(parts)


def _lines(claim: Claim) -> str:
    return "\n".join([f"- {claim.text}", *(f"  - `{find_test(name)}`" for name in claim.tests)])


if __name__ == "__main__":
    sys.stdout.write(page())
