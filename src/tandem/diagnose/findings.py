"""What is found in a data set: counted, with a few rows to look at."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tandem.data.records import Origin
from tandem.diagnose.credentials import masked

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
# Characters of an excerpt, and those around it that tell whether a secret reaches into it.
_EXCERPT = 90
_AROUND = 4096
_BLANKS = re.compile(r"(?:[ \t\n]|\r\n)+")


@dataclass(frozen=True, slots=True)
class Sign:
    """Something to look for: `error` would not train, a `warning` spoils it, a `note` may be meant.

    Attributes:
        name: what it is called in the JSON, never changed.
        title: in the terminal.
        severity: how bad it is.
        hint: what to do.
        of: what its share is of.
        about: which of several, where a name alone is not enough.
    """

    name: str
    title: str
    severity: Severity
    hint: str
    of: Literal["records", "pairs", "answers"] = "records"
    about: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from others."""
        return self.name, self.about


@dataclass(frozen=True, slots=True)
class Example:
    """A row to look at."""

    file: str
    row: int
    excerpt: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A sign that was found `count` times among `of` records (or pairs, or answers)."""

    sign: Sign
    count: int
    of: int
    examples: tuple[Example, ...]
    kinds: dict[str, int]

    @property
    def share(self) -> float:
        """Of all that it could have been found in."""
        return self.count / self.of if self.of else 0.0

    def as_json(self) -> dict[str, Any]:
        """The finding as plain values."""
        return {
            "name": self.sign.name,
            "about": self.sign.about,
            "severity": self.sign.severity,
            "title": self.sign.title,
            "count": self.count,
            "of": self.of,
            "unit": self.sign.of,
            "share": round(self.share, 6),
            "kinds": self.kinds,
            "rows": [asdict(example) for example in self.examples],
            "hint": self.sign.hint,
        }


@dataclass(slots=True)
class _Counted:
    sign: Sign
    count: int = 0
    examples: list[Example] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


class Tally:
    """Counts signs, and keeps the first `shown` rows of each."""

    def __init__(self, shown: int) -> None:
        self._shown = shown
        self._counted: dict[tuple[str, str], _Counted] = {}

    def add(self, sign: Sign, origin: Origin, text: str, at: int = 0, kind: str = "") -> None:
        """Count a sign once; `text` from about position `at` is what a reader will see of it."""
        shown = excerpt(text, at) if self.wants(sign) else ""
        self.add_example(sign, origin, shown, kind)

    def add_example(self, sign: Sign, origin: Origin, shown: str, kind: str = "") -> None:
        """Count a sign once, with what is shown of it."""
        counted = self._counted.setdefault(sign.key, _Counted(sign))
        counted.count += 1
        if kind:
            counted.kinds[kind] += 1
        if len(counted.examples) < self._shown:
            shown = f"{kind}: {shown}" if kind else shown
            counted.examples.append(Example(origin.file, origin.row, shown))

    def wants(self, sign: Sign) -> bool:
        """Whether a sign has fewer rows than are shown."""
        counted = self._counted.get(sign.key)
        return counted is None or len(counted.examples) < self._shown

    def count_only(self, sign: Sign, count: int) -> None:
        """Count a sign some more times, without rows."""
        if count:
            self._counted.setdefault(sign.key, _Counted(sign)).count += count

    def findings(self, of: dict[str, int]) -> list[Finding]:
        """All that was counted, the worst and most frequent first.

        Args:
            of: how many records, pairs and answers there were.
        """
        found = [
            Finding(
                one.sign,
                one.count,
                max(of[one.sign.of], one.count),
                tuple(one.examples),
                dict(one.kinds.most_common()),
            )
            for one in self._counted.values()
        ]
        return sorted(found, key=_weight)


def _weight(finding: Finding) -> tuple[int, int, tuple[str, str]]:
    return SEVERITIES.index(finding.sign.severity), -finding.count, finding.sign.key


def excerpt(text: str, at: int = 0) -> str:
    """One line of a text around a position, secrets masked."""
    start = max(0, at - _EXCERPT // 3) if len(text) > _EXCERPT else 0
    # Wide enough that a secret at its edge is seen whole.
    left = max(0, start - _AROUND)
    around = masked(text[left : start + _EXCERPT + _AROUND])
    shown = around[start - left : start - left + _EXCERPT]
    line = visible(_BLANKS.sub(" ", shown).strip(" "))
    return ("..." if start else "") + line + ("..." if start + _EXCERPT < len(text) else "")


def visible(text: str) -> str:
    """A text as it can be seen: characters that print nothing as their code."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
