"""What the documents say in a form that tests can check: fenced blocks, commands, links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)

LAUNCHERS = ("torchrun", "deepspeed", "accelerate")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: the word behind its fence, and its text."""

    page: Path
    language: str
    text: str


def page_name(page: Path) -> str:
    """A page as tests name it: its path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page, in order; all of them when no language is named."""
    found = [Block(page, language, text) for language, text in _FENCE.findall(page.read_text())]
    return [block for block in found if not languages or block.language in languages]


def without_blocks(page: Path) -> str:
    """A page's text outside of fenced blocks."""
    return _FENCE.sub("", page.read_text())


def commands(block: Block) -> list[list[str]]:
    """The words of each command line of a shell block; here-documents are no commands."""
    text = re.sub(r"<<'(\w+)'\n.*?^\1$", "", block.text, flags=re.MULTILINE | re.DOTALL)
    lines = text.replace("\\\n", " ").splitlines()
    return [inside(words) for line in lines if (words := shlex.split(line, comments=True))]


def inside(words: list[str]) -> list[str]:
    """What a `docker run` of one of our images runs in it; other commands as they are."""
    if words[:2] != ["docker", "run"]:
        return words
    entry = words[words.index("--entrypoint") + 1] if "--entrypoint" in words else "tandem"
    (image,) = (i for i, word in enumerate(words) if re.fullmatch(r"tandem:(cpu|cuda|hpu)", word))
    return [entry, *words[image + 1 :]]


def tandem_commands() -> list[tuple[str, list[str]]]:
    """Every `tandem ...` command line of every page, with the page's name.

    One that a launcher starts is what each of its processes runs.
    """
    return [
        (page_name(page), words[words.index("tandem") :])
        for page in PAGES
        for words in _shown(page)
        if words[0] in ("tandem", *LAUNCHERS)
    ]


def launches() -> list[list[str]]:
    """Every command line of every page that a launcher is called with."""
    return [words for page in PAGES for words in _shown(page) if words[0] in LAUNCHERS]


def _shown(page: Path) -> list[list[str]]:
    """The command lines of a page's shell blocks, and of plain blocks that begin with one."""
    first = tuple(f"{name} " for name in ("tandem", *LAUNCHERS))
    return [
        words
        for block in blocks(page, "", "sh")
        if block.language or block.text.startswith(first)
        for words in commands(block)
    ]
