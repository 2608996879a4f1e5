"""How llama.cpp cuts a text before it merges bytes, by the names that its files give.

llama.cpp knows these names alone and has the expressions in its code. A tokenizer whose own
expressions are none of them cannot be exported: another name would give other tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s+(?!\S)|\s+"
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _END
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_DIGIT = r"\p{N}"


def _words(digits: str) -> str:
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|{_END}"
    )


def _cased(digits: str, ending: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}|\p{{N}}{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_END}"
    )


def _cased_in_ascii(digits: str, ending: str) -> str:
    """What llama.cpp has in place of `_cased`: letters of other alphabets are of both cases."""
    start, upper, lower = r"[^\r\n\p{L}\p{N}]?", r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
    return (
        rf"{start}{upper}*{lower}+{ending}|{start}{upper}+{lower}*{ending}|\p{{N}}{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|{_END}"
    )


@dataclass(frozen=True)
class PreTokenizer:
    """The expressions that cut a text one after the other."""

    expressions: tuple[str, ...]  # of the model's tokenizer
    # a word that the vocabulary has is one token, whatever the merges say
    whole_words: bool = False
    approximate: tuple[str, ...] = ()  # llama.cpp's own, where they are others

    @property
    def of_llama_cpp(self) -> tuple[str, ...]:
        """The expressions by which llama.cpp cuts."""
        return self.approximate or self.expressions


KNOWN: dict[str, PreTokenizer] = {
    "llama-bpe": PreTokenizer((_words("{1,3}"),), whole_words=True),
    "dbrx": PreTokenizer((_words("{1,3}"),)),
    "qwen2": PreTokenizer((_words(""),)),
    "gpt-2": PreTokenizer((_BYTE_LEVEL,)),
    "smollm": PreTokenizer((_DIGIT, _BYTE_LEVEL)),
    "deepseek-v3": PreTokenizer(
        (
            r"\p{N}{1,3}",
            "[一-龥\u3040-ゟ゠-ヿ]+",
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?"
            "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|" + _END,
        )
    ),
    "gpt-4o": PreTokenizer(
        (_cased("{1,3}", f"{_CONTRACTIONS}?"),),
        approximate=(_cased_in_ascii("{1,3}", f"{_CONTRACTIONS}?"),),
    ),
    "tekken": PreTokenizer(
        (_cased("", ""),), whole_words=True, approximate=(_cased_in_ascii("", ""),)
    ),
}
"""llama.cpp's names, and what each does."""

# Names under which llama.cpp does the same.
ALSO: dict[str, str] = {
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "dbrx",
    "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "phi-2": "gpt-2", "mellum": "gpt-2",
    "llama4": "gpt-4o",
}  # fmt: skip


def known(name: str) -> PreTokenizer | None:
    """What llama.cpp does under a name, None for one that is not known here."""
    return KNOWN.get(ALSO.get(name, name))


def name_of(pre_tokenizer: Mapping[str, Any] | None, *, whole_words: bool) -> str | None:
    """llama.cpp's name of the pre-tokenizer of a tokenizer.json; None where it has none.

    `whole_words` is what the tokenizer's model calls `ignore_merges`.
    """
    expressions = _expressions(pre_tokenizer)
    if expressions is None:
        return None
    wanted = (expressions, whole_words)
    return next(
        (name for name, one in KNOWN.items() if (one.expressions, one.whole_words) == wanted), None
    )


def _expressions(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The expressions of byte-level pre-tokenizers in their order; None for others."""
    if pre_tokenizer is None:
        return None
    steps: Sequence[Mapping[str, Any]] = [pre_tokenizer]
    if pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    found: list[str] = []
    for step in steps:
        kind = step["type"]
        if kind == "Split":
            pattern = step["pattern"].get("Regex")
            if pattern is None or step["behavior"] != "Isolated" or step["invert"]:
                return None
            found.append(pattern)
        elif kind == "Digits" and step["individual_digits"]:
            found.append(_DIGIT)
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            if step["use_regex"]:
                found.append(_BYTE_LEVEL)
        else:
            return None
    return tuple(found) if steps[-1]["type"] == "ByteLevel" else None
