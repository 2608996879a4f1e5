"""A guess at a text's language, by its script and its commonest words."""

from __future__ import annotations

import re
from collections import Counter

# The first letter of each range, the last, and the language it stands for.
_SCRIPTS = (
    ("\u0370", "\u03ff", "el"),
    ("\u0400", "\u052f", "ru"),
    ("\u0590", "\u05ff", "he"),
    ("\u0600", "\u06ff", "ar"),
    ("\u0900", "\u097f", "hi"),
    ("\u0e00", "\u0e7f", "th"),
    ("\u3040", "\u30ff", "ja"),
    ("\uac00", "\ud7af", "ko"),
    ("\u4e00", "\u9fff", "zh"),
)
_COMMON = {
    "en": "the of and to in is that it for was with as on are this be by an have not you",
    "de": "der die das und ist nicht ein eine zu mit von den im auf für sich auch wird sind ich",
    "fr": "le la les des et est une dans pour que qui pas sur au du avec ce il sont vous",
    "es": "el los las y es una que en por con para del se no su como más está pero al",
    "it": "il gli che di è una per non con sono della nel anche come più si ma questo dei alla",
    "pt": "o os as e é um uma que não em para com do da dos mais como mas ao são",
    "nl": "de het een en van is dat niet op te voor met zijn aan er ook als maar wordt bij",
    "sv": "och att det är en som på för med inte den av till har ett om men jag de vi",
    "pl": "w i na z że nie się do jest to jak o ale od przez po są czy dla już",
    "tr": "ve bir bu için ile de da çok olarak daha olan gibi ne ama en kadar var değil sonra ben",
}
_WORDS = {language: frozenset(words.split()) for language, words in _COMMON.items()}
LANGUAGES = (*_WORDS, "ru", "el", "he", "ar", "hi", "th", "ja", "ko", "zh")
# A text is in a script when this share of its letters is; Japanese when this share is kana.
_MOST, _SOME = 0.5, 0.1
# So many different common words speak for a language; fewer do in a text of few words.
_FEWEST, _FEWEST_SHORT, _SHORT = 3, 2, 15


def guess_language(text: str) -> str | None:
    """The language of a text, one of `LANGUAGES`, or None when it does not say.

    By script alone where a script stands for one language here: Cyrillic counts as Russian,
    Devanagari as Hindi, Arabic letters as Arabic. Latin letters are told apart by twenty common
    words of each of ten languages; short texts, names and code have too few of them.
    """
    letters: Counter[str] = Counter()
    total = 0
    for letter in text:
        if letter.isalpha():
            total += 1
            if letter >= _SCRIPTS[0][0]:
                for first, last, language in _SCRIPTS:
                    if first <= letter <= last:
                        letters[language] += 1
                        break
    if not total:
        return None
    if letters["ja"] + letters["zh"] > _MOST * total:
        return "ja" if letters["ja"] > _SOME * total else "zh"
    for language, count in letters.most_common(1):
        if count > _MOST * total:
            return language
    return _by_words(text)


def _by_words(text: str) -> str | None:
    """By how many different common words occur; one alone, however often, may be a variable."""
    words = {word for word in re.findall(r"[^\W\d_]+", text.lower()) if len(word) > 1}
    found = Counter({language: len(words & common) for language, common in _WORDS.items()})
    (best, most), (_, second) = found.most_common(2)
    least = _FEWEST_SHORT if len(words) < _SHORT else _FEWEST
    return best if most >= least and most > second else None
