"""What a rehearsal found: by stage, what worked or why it failed; and what it cannot say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from rich.console import Console

from tandem.errors import TandemError
from tandem.pipeline.rehearsal.shortened import Change
from tandem.runtime.console import log


@dataclass(frozen=True)
class Finding:
    """One thing that was tried."""

    stage: str  # a stage of the run, or what comes before the first one
    passed: bool
    text: str  # what was seen; of a failure, the message with its mend
    seconds: float = 0.0


@dataclass(frozen=True)
class Rehearsal:
    """All findings of a recipe."""

    findings: tuple[Finding, ...]
    skipped: tuple[str, ...]  # stages that were not reached
    changes: tuple[Change, ...]  # what was other than in the recipe
    not_shown: tuple[str, ...]
    notes: tuple[str, ...]  # what a user should know, and no failure
    seconds: float
    folder: Path | None  # where its files are; None where they were removed

    @property
    def failed(self) -> list[Finding]:
        """What did not work."""
        return [finding for finding in self.findings if not finding.passed]


@dataclass
class Notebook:
    """Findings as they are made; `translated` puts the user's own names into a message."""

    console: Console
    translated: Callable[[str], str]
    findings: list[Finding] = field(default_factory=list)
    not_shown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether something did not work so far."""
        return any(not finding.passed for finding in self.findings)

    def note(self, *lines: str) -> None:
        """Keep lines that are not there yet."""
        self.notes += [line for line in dict.fromkeys(lines) if line not in self.notes]

    @contextmanager
    def trying(self, stage: str, what: str = "") -> Iterator[list[str]]:
        """Something that is tried: what is put into the list was seen, an error is a failure."""
        began, seen = perf_counter(), list[str]()
        log(self.console, f"rehearsing {stage}{what and ': '}{what}", style="bold")
        passed = True
        try:
            yield seen
        except TandemError as error:
            passed, seen = False, [str(error)]
        if seen:
            text = self.translated("; ".join(seen))
            self.findings.append(Finding(stage, passed, text, perf_counter() - began))
