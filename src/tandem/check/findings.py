"""Findings in a data set: signs that are counted, with a few rows to look at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tandem.data.records import Origin

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
# Characters of an excerpt, and those around it that tell whether a secret reaches into it.
_EXCERPT = 90
_AROUND = 4096
_BLANKS = re.compile(r"(?:[ \t\n]|\r\n)+")


@dataclass(frozen=True, slots=True)
class Sign:
    """Something to look for: an `error` stops a run, a `warning` harms it, a `note` may be fine."""

    name: str  # in the JSON, never changed
    title: str  # in the terminal
    severity: Severity
    hint: str  # what to do
    of: Literal["records", "pairs", "answers"] = "records"  # what its share is of
    about: str = ""  # tells signs with the same name apart

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.about


@dataclass(frozen=True, slots=True)
class FoundRow:
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
    rows: tuple[FoundRow, ...]
    kinds: dict[str, int]

    @property
    def share(self) -> float:
        """The share of `of` with the sign."""
        return self.count / self.of if self.of else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the finding as plain values."""
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
            "rows": [asdict(row) for row in self.rows],
            "hint": self.sign.hint,
        }


@dataclass(slots=True)
class _Counted:
    sign: Sign
    count: int = 0
    rows: list[FoundRow] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)


class Tally:
    """Counts signs, and keeps the first `shown` rows of each."""

    def __init__(self, shown: int) -> None:
        self._shown = shown
        self._counted: dict[tuple[str, str], _Counted] = {}

    def add(self, sign: Sign, origin: Origin, text: str, at: int = 0, kind: str = "") -> None:
        """Count a sign once; an example shows `text` from about position `at`."""
        shown = excerpt(text, at) if self.wants(sign) else ""
        self.add_example(sign, origin, shown, kind)

    def add_example(self, sign: Sign, origin: Origin, shown: str, kind: str = "") -> None:
        """Count a sign once, with an example."""
        counted = self._counted.setdefault(sign.key, _Counted(sign))
        counted.count += 1
        if kind:
            counted.kinds[kind] += 1
        if len(counted.rows) < self._shown:
            shown = f"{kind}: {shown}" if kind else shown
            counted.rows.append(FoundRow(origin.file, origin.row, shown))

    def wants(self, sign: Sign) -> bool:
        """Return whether a sign has fewer rows than are shown."""
        counted = self._counted.get(sign.key)
        return counted is None or len(counted.rows) < self._shown

    def merge(self, later: Tally) -> None:
        """Count the signs of records that follow."""
        for key, found in later._counted.items():
            counted = self._counted.setdefault(key, _Counted(found.sign))
            counted.count += found.count
            counted.kinds.update(found.kinds)
            counted.rows += found.rows[: max(0, self._shown - len(counted.rows))]

    def count_only(self, sign: Sign, count: int) -> None:
        """Count a sign some more times, without rows."""
        if count:
            self._counted.setdefault(sign.key, _Counted(sign)).count += count

    def findings(self, of: dict[str, int]) -> list[Finding]:
        """Return all findings, worst first; `of` has the numbers of records, pairs, answers."""
        ordered = sorted(
            self._counted.values(),
            key=lambda one: (SEVERITIES.index(one.sign.severity), -one.count, one.sign.key),
        )
        return [
            Finding(
                one.sign,
                one.count,
                max(of[one.sign.of], one.count),
                tuple(one.rows),
                dict(one.kinds.most_common()),
            )
            for one in ordered
        ]


def excerpt(text: str, at: int = 0) -> str:
    """Return one line of a text around a position, secrets masked."""
    start = max(0, at - _EXCERPT // 3) if len(text) > _EXCERPT else 0
    # Wide enough to see a secret at its edge whole.
    left = max(0, start - _AROUND)
    around = masked(text[left : start + _EXCERPT + _AROUND])
    shown = around[start - left : start - left + _EXCERPT]
    line = visible(_BLANKS.sub(" ", shown).strip(" "))
    return ("..." if start else "") + line + ("..." if start + _EXCERPT < len(text) else "")


def visible(text: str) -> str:
    """Return a text with the codes of characters that print nothing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_SHOWN = 4  # characters of a secret


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of secret: texts without any of its `needles` do not have it."""

    kind: str
    needles: tuple[str, ...]
    pattern: re.Pattern[str]


def _shape(kind: str, needles: str, pattern: str) -> Shape:
    return Shape(kind, tuple(needles.split()), re.compile(pattern))


KEYS: tuple[Shape, ...] = (
    _shape("AWS access key", "AKIA ASIA", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    _shape("GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_",
           r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})\b"),
    _shape("Anthropic key", "sk-ant-", r"\bsk-ant-[A-Za-z0-9_-]{20,}"),
    _shape("OpenAI key", "sk-",
           r"\bsk-(?!ant-)(?:proj-|svcacct-|admin-)?(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{32,}"),
    _shape("Stripe key", "sk_live_ rk_live_", r"\b[sr]k_live_[A-Za-z0-9]{20,}\b"),
    _shape("Hugging Face token", "hf_", r"\bhf_[A-Za-z0-9]{30,}\b"),
    _shape("Slack token", "xox", r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    _shape("Google API key", "AIza", r"\bAIza[0-9A-Za-z_-]{35}"),
    _shape("JSON Web Token", "eyJ",
           r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
    _shape("private key", "-----BEGIN",
           r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\sA-Za-z0-9+/=:,-]{20,}"),
)  # fmt: skip
ADDRESSES: tuple[Shape, ...] = (
    _shape(
        "e-mail address",
        "@",
        # Not the addresses that examples are written with.
        r"\b[A-Za-z0-9._%+-]{1,64}@(?!(?:[\w-]+\.)*(?:example|email|test|domain|mail|company|website)\.)"
        r"[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\b",
    ),
)


def credentials(text: str, shapes: tuple[Shape, ...] = KEYS) -> Iterator[tuple[str, int]]:
    """Yield the kinds of secrets in a text, each once, with the position of its first."""
    for shape in shapes:
        if any(needle in text for needle in shape.needles) and (
            match := shape.pattern.search(text)
        ):
            yield shape.kind, match.start()


def masked(text: str) -> str:
    """Return a text with asterisks for all but the first characters of apparent secrets."""
    for shape in (*KEYS, *ADDRESSES):
        if any(needle in text for needle in shape.needles):
            text = shape.pattern.sub(_mask, text)
    return text


def _mask(match: re.Match[str]) -> str:
    secret = match.group()
    kept = 27 if secret.startswith("-----BEGIN") else _SHOWN
    return secret[:kept] + "*" * (len(secret) - kept)
