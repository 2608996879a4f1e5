"""Signs in a single text: damaged encoding, control tokens, secrets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tandem.check.findings import ADDRESSES, KEYS, Shape, Sign, credentials

# The characters of Windows-1252 where Latin-1 has control characters.
_HIGH = "".join(bytes([code]).decode("cp1252", "ignore") for code in range(0x80, 0xA0))
_TRAIL = f"[\x80-\xbf{re.escape(_HIGH)}]"
# A first byte of UTF-8 and the bytes that follow it, each read as a character of its own.
_MOJIBAKE = re.compile(f"[\xc2-\xdf]{_TRAIL}|[\xe0-\xef]{_TRAIL}{{2}}|[\xf0-\xf4]{_TRAIL}{{3}}")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]")
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{2,5}|#x[0-9a-fA-F]{2,4});")
# Marks of the templates in use: control tokens, the tokens that begin and end texts, headings with
# the speaker. Headings that documents have as well count only at a template's places.
_TOKENS = re.compile(
    r"<\|[A-Za-z]\w{1,40}\|>|<\uff5c[^<>\uff5c\n]{1,40}\uff5c>"
    r"|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|</?s>"
    r"|^### (?:User|Assistant|System|Human):?[ \t]*$|### ?(?:Human|Assistant):"
    r"|^### ?Instruction:|^### ?Response:\s*\Z",
    re.MULTILINE,
)
# How HH-RLHF marks who speaks.
_ASKED, _ANSWERED = re.compile(r"(?:\A|\n\n)Human:"), "\n\nAssistant:"

REPLACED = Sign(
    "replacement_characters", "replacement characters (U+FFFD)", "warning",
    "Characters were lost when the file was made: make it anew from the source.",
)  # fmt: skip
MOJIBAKE = Sign(
    "mojibake", "UTF-8 read as Latin-1 or Windows-1252 (Ã©, â€™)", "warning",
    "Decode the source as UTF-8; the package ftfy can mend such texts.",
)  # fmt: skip
CONTROL = Sign(
    "control_characters", "control characters, or carriage returns alone", "warning",
    "Remove them, or find out what they were.",
)  # fmt: skip
INVISIBLE = Sign(
    "invisible_characters",
    "characters that print nothing (zero width, byte order mark, direction)", "note",
    "Remove them, unless the writing needs them.",
)  # fmt: skip
ENTITIES = Sign(
    "html_entities", "HTML entities in texts without tags (&amp;, &quot;, &#39;)", "note",
    "Unescape the texts, unless they are about HTML.",
)  # fmt: skip
TOKENS = Sign(
    "template_tokens", "marks of a chat template or a transcript within texts", "warning",
    "Texts were rendered before: give turns instead, or remove the marks.",
)  # fmt: skip
SPECIAL = Sign(
    "special_tokens", "special tokens of this tokenizer within texts", "warning",
    "They become control tokens, not text: remove them.",
)  # fmt: skip
SECRETS = Sign(
    "secrets", "strings in the shape of keys", "warning",
    "A model can repeat what it was trained on: remove them, and revoke those that are real.",
)  # fmt: skip
EMAILS = Sign("email_addresses", "e-mail addresses", "note", "Remove those of people.")


@dataclass(frozen=True, slots=True)
class _Check:
    """How to look for a sign; texts without any of the needles are skipped."""

    sign: Sign
    needles: tuple[str, ...]
    find: Callable[[str], tuple[int, str] | None]


class TextSigns:
    """Looks for signs in many texts at once, a tokenizer's special tokens among them."""

    def __init__(self, special: Sequence[str] = ()) -> None:
        tokens = tuple(token for token in special if len(token) > 2 and not token.isspace())
        any_token = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        self._checks = (
            _Check(REPLACED, ("\ufffd",), _search(re.compile("\ufffd"))),
            _Check(MOJIBAKE, (), _mojibake),
            _Check(CONTROL, (), _search(_CONTROL)),
            _Check(INVISIBLE, (), _search(_INVISIBLE)),
            _Check(ENTITIES, ("&",), _entities),
            _Check(SECRETS, _needles(KEYS), lambda text: _secret(text, KEYS)),
            _Check(EMAILS, ("@",), lambda text: _secret(text, ADDRESSES)),
            _Check(
                TOKENS,
                ("<|", "<\uff5c", "INST]", "SYS>>", "_of_turn>", "s>", "###"),
                _search(_TOKENS, without=tokens),
            ),
            _Check(TOKENS, (_ANSWERED,), _transcript),
            *([_Check(SPECIAL, tokens, _search(any_token))] if tokens else []),
        )

    def find(self, texts: Sequence[str]) -> Iterator[tuple[int, Sign, int, str]]:
        """Yield the number of each text with a sign, the sign, its position and its kind."""
        joined = "\n".join(texts)
        plain = joined.isascii()
        for check in self._checks:
            if plain and check.sign in _BEYOND_ASCII:
                continue
            if not check.needles and not _QUICK[check.sign.name].search(joined):
                continue
            present = [needle for needle in check.needles if needle in joined]
            if check.needles and not present:
                continue
            for number, text in enumerate(texts):
                if not check.needles or any(needle in text for needle in present):
                    place = check.find(text)
                    if place is not None:
                        yield number, check.sign, *place


_BEYOND_ASCII = (MOJIBAKE, INVISIBLE, REPLACED)
_QUICK = {
    "mojibake": re.compile(f"[\xc2-\xf4]{_TRAIL}"),
    # All carriage returns, because a class alone is found much sooner.
    "control_characters": re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"),
    "invisible_characters": _INVISIBLE,
}


def _search(
    pattern: re.Pattern[str], without: Sequence[str] = ()
) -> Callable[[str], tuple[int, str] | None]:
    def find(text: str) -> tuple[int, str] | None:
        places = (one.start() for one in pattern.finditer(text) if one.group() not in without)
        return next(((start, "") for start in places), None)

    return find


def _needles(shapes: Sequence[Shape]) -> tuple[str, ...]:
    return tuple(needle for shape in shapes for needle in shape.needles)


def _mojibake(text: str) -> tuple[int, str] | None:
    """Return the position of the first run that is UTF-8 once its characters are bytes again."""
    for run in _MOJIBAKE.finditer(text):
        try:
            b"".join(map(_byte, run.group())).decode("utf-8")
        except UnicodeError:
            continue
        return run.start(), ""
    return None


def _byte(character: str) -> bytes:
    code = ord(character)
    return bytes([code]) if code < 0x100 else character.encode("cp1252")


def _transcript(text: str) -> tuple[int, str] | None:
    """Return the position of a second speaker in a text."""
    asked = _ASKED.search(text)
    if asked is None:
        return None
    answered = text.find(_ANSWERED, asked.end())
    return None if answered < 0 else (answered, "")


def _entities(text: str) -> tuple[int, str] | None:
    entity = _ENTITY.search(text)
    # A text with tags or code is about HTML.
    if entity is None or "</" in text or "```" in text or "/>" in text:
        return None
    return entity.start(), ""


def _secret(text: str, shapes: tuple[Shape, ...]) -> tuple[int, str] | None:
    return next(((start, kind) for kind, start in credentials(text, shapes)), None)
