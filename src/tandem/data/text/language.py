"""A guess at the language of a text: by its script, and by small words where scripts are shared."""

from __future__ import annotations

import re
from collections import Counter
from types import MappingProxyType

# Characters of a text that are looked at.
_LOOKED_AT = 400
# Different small words that a text must have, and more of them than of any other language's.
_ENOUGH, _ENOUGH_OF_MANY, _MANY = 2, 3, 20

_SCRIPTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(f"[{ranges}]"))
    for name, ranges in (
        ("ja", "\u3040-\u30ff"),
        ("ko", "\uac00-\ud7af"),
        ("zh", "\u4e00-\u9fff"),
        ("el", "\u0370-\u03ff"),
        ("he", "\u0590-\u05ff"),
        ("ar", "\u0600-\u06ff"),
        ("hi", "\u0900-\u097f"),
        ("bn", "\u0980-\u09ff"),
        ("ta", "\u0b80-\u0bff"),
        ("th", "\u0e00-\u0e7f"),
        ("ru", "\u0400-\u04ff"),
    )
)
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"[^\W\d_]+")
_SMALL_WORDS = MappingProxyType(
    {
        # Single letters are names of variables more often than words.
        name: frozenset(word for word in words.split() if len(word) > 1)
        for name, words in {
            "en": "the of and to in is that it for was with as are this be you what how "
            "which from have not on an by or can i my your we they do does there",
            "de": "der die das und ist nicht ein eine zu den von mit sich auf für dem des im "
            "wie was ich sie es wird auch als oder bei kann wir",
            "fr": "le la les des et est un une dans que qui pour pas sur au du en il elle ce "
            "sont avec par plus je vous nous cette où être",
            "es": "el la los las de y es un una en que por para con del se no al como su más "
            "está son lo qué cómo pero",
            "it": "il lo gli di e è un una che per non con del della nel sono si come da al "
            "questo più anche alla dei",
            "pt": "o os as de e é um uma em que por para com do da não no na se como mais são "
            "dos ao você está",
            "nl": "de het een en van is niet dat op te voor met zijn aan die er in als ook wordt "
            "om je bij hoe wat",
            "pl": "i w na jest nie się z do to że jak co od za po są dla przez lub czy",
            "sv": "och att det är en som på av för med den till inte ett har om hur jag kan",
            "tr": "ve bir bu için ile da de ne çok olarak olan gibi daha var nasıl değil",
            "id": "yang dan di untuk dengan dari ini pada adalah tidak dalam itu ke akan apa "
            "bagaimana atau",
            "vi": "và của là có cho không một các được trong những với người này đã để khi",
            "ro": "și în de la cu nu este un o pe care să din mai pentru sunt ce",
        }.items()
    }
)
LANGUAGES = (*_SMALL_WORDS, *(name for name, _ in _SCRIPTS), "uk")
"""What can be told."""
_LANGUAGES_OF: dict[str, list[str]] = {}
for _name, _words in _SMALL_WORDS.items():
    for _word in _words:
        _LANGUAGES_OF.setdefault(_word, []).append(_name)
_KNOWN = frozenset(_LANGUAGES_OF)
_CYRILLIC_UKRAINIAN = re.compile("[іїєґІЇЄҐ]")


def language_of(text: str) -> str | None:
    """The code of a text's language (ISO 639-1), one of `LANGUAGES`, or None.

    A guess, and only that: short texts, code and names are None, and languages that are not in
    this file are None or taken for a relative (Bulgarian for Russian).
    """
    text = text[:_LOOKED_AT]
    if not text.isascii():
        letters = len(_LETTER.findall(text))
        for name, script in _SCRIPTS:
            # Japanese is written with Chinese characters as well.
            share = 0.1 if name == "ja" else 0.4
            if letters and len(script.findall(text)) >= share * letters:
                return "uk" if name == "ru" and _CYRILLIC_UKRAINIAN.search(text) else name
    words = set(_WORD.findall(text.lower()))
    counts = Counter(name for word in words & _KNOWN for name in _LANGUAGES_OF[word])
    (best, most), (_, second) = [*counts.most_common(2), ("", 0), ("", 0)][:2]
    enough = _ENOUGH if len(words) < _MANY else _ENOUGH_OF_MANY
    return best if most >= enough and most > second else None
