"""Strings in the shape of keys and addresses, and how they are masked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# Characters of a secret that are shown.
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """One kind of secret: texts without any of its `needles` cannot hold it."""

    kind: str
    needles: tuple[str, ...]
    pattern: re.Pattern[str]


def _shape(kind: str, needles: str, pattern: str) -> Shape:
    return Shape(kind, tuple(needles.split()), re.compile(pattern))


KEYS: tuple[Shape, ...] = (
    _shape("AWS access key", "AKIA ASIA", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    _shape(
        "GitHub token",
        "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_",
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{50,})\b",
    ),
    _shape("Anthropic key", "sk-ant-", r"\bsk-ant-[A-Za-z0-9_-]{20,}"),
    _shape(
        "OpenAI key",
        "sk-",
        r"\bsk-(?!ant-)(?:proj-|svcacct-|admin-)?(?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{32,}",
    ),
    _shape("Stripe key", "sk_live_ rk_live_", r"\b[sr]k_live_[A-Za-z0-9]{20,}\b"),
    _shape("Hugging Face token", "hf_", r"\bhf_[A-Za-z0-9]{30,}\b"),
    _shape("Slack token", "xox", r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    _shape("Google API key", "AIza", r"\bAIza[0-9A-Za-z_-]{35}"),
    _shape(
        "JSON Web Token", "eyJ", r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
    ),
    _shape(
        "private key",
        "-----BEGIN",
        r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\sA-Za-z0-9+/=:,-]{20,}",
    ),
)
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
    """The kinds of secrets in a text, each once, with the position of its first."""
    for shape in shapes:
        if any(needle in text for needle in shape.needles) and (
            found := shape.pattern.search(text)
        ):
            yield shape.kind, found.start()


def masked(text: str) -> str:
    """The text, all but the first characters of what looks like a secret as asterisks."""
    for shape in (*KEYS, *ADDRESSES):
        if any(needle in text for needle in shape.needles):
            text = shape.pattern.sub(_mask, text)
    return text


def _mask(found: re.Match[str]) -> str:
    secret = found.group()
    kept = 27 if secret.startswith("-----BEGIN") else _SHOWN
    return secret[:kept] + "*" * (len(secret) - kept)
