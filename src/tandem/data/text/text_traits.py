"""What a text alone tells: whether an answer refuses (in English), is right, and its language."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import MappingProxyType

# Refusals and disclaimers come at the beginning; further on, the same words are quoted, spoken by
# somebody else, or about a detail after an answer.
_WITHIN = 200
# A longer answer that refuses goes on to something, a safer answer for instance.
_SHORT = 600
_CANNOT = (
    r"(?:can(?:'t|not| not)|(?:am|'m) (?:currently )?(?:unable|not able) to"
    r"|(?:won't|will not)(?: be able to)?)"
)
# What an assistant is asked for. `I can't see the stage from here` is a story.
_ASKED = (
    r"(?:help|assist|answer|provide|fulfill?|comply|do (?:that|this|so)|discuss|create|generate|"
    r"engage|support|write|give(?! (?:up|in|way))|share|produce|participate|offer|advise|respond|"
    r"recommend|directly|access|browse|verify|determine|develop|draw|endorse|encourage|promote|"
    r"condone|run|execute|explain|classify|translate|perform|complete|continue with)"
)
_AI = (
    r"(?:ai|artificial intelligence)(?: (?:text-based|language|model|assistant|system|chatbot|"
    r"program))*(?=[,.;:]| (?:and|i|it|so|but|built|trained|designed|developed|created|without)\b)"
)
_REFUSES = re.compile(
    # With which letters they begin, said first: most words are passed sooner.
    r"(?<!\w)(?=[aistru])(?:"
    # An AI that says it is one. `As an AI researcher` does not, nor does the hero of a story.
    r"as an? (?:[\w-]+ (?:and [\w-]+ )?)?"
    + _AI
    + r"|i(?:'m| am) (?:just |only |merely )?an "
    + _AI
    + r"|(?:as|i(?:'m| am)) (?:just |only |merely )?an? (?:large )?language model\b"
    r"|i (?:do not|don't) have (?:personal |any )(?:opinions|beliefs|feelings|emotions|preferences)"
    # Refusals.
    r"|i ?" + _CANNOT + r"(?: \w+ly| also| just)? " + _ASKED + r"\b"
    r"|i (?:must|have to|need to|will have to|would have to|respectfully|would|will) "
    r"(?:\w+ly )?(?:decline|refuse)\b"
    r"|i (?:\w+ly )?(?:decline|refuse) to " + _ASKED + r"\b"
    r"|i(?:'d| would) (?:rather|prefer) not (?:to )?" + _ASKED + r"\b"
    r"|i (?:do not|don't) (?:feel comfortable|think (?:that )?i can " + _ASKED + r")\b"
    r"|i(?:'m| am) not (?:comfortable|permitted|allowed|programmed|authori[sz]ed|at liberty) "
    r"(?:to|with|in|\w+ing)\b"
    r"|(?:that|this|it)(?:'s| is) not something (?:that )?i(?:'m| am| can)\b"
    r"|it (?:would be|is|would not be|is not) (?:in)?(?:appropriate|unethical|ethical) for me to\b"
    # Apologies that go on to one.
    r"|(?:sorry|afraid|apologi[sz]e|apologies|unfortunately|regrettably)(?: for [^.!?]{0,60})?,? "
    r"(?:but |that )*(?:as an?\b|i ?" + _CANNOT + r"|i (?:do not|don't) (?:have|know)\b"
    r"|it(?:'s| is) not (?:appropriate|ethical|acceptable))"
    r"|^(?:unable to " + _ASKED + r"|request denied)\b"
    r")",
    re.IGNORECASE,
)
_HELPS = re.compile(
    r"\b(?:however|instead|for example|in general|sure|suggest|recommend|"
    r"I(?: can|'ll|'d| would| will| could| believe) (?!not)|here(?:'s| is| are)|can still|"
    r"let me)\b",
    re.IGNORECASE,
)


def refuses(answer: str) -> bool:
    """Return whether an answer begins like a language model's refusal or disclaimer, in English.

    `I must decline to answer that.` refuses, `As an AI language model, I have no body, but ...`
    disclaims. Both count, because neither should be learnt or preferred unnoticed.
    """
    return _REFUSES.search(answer[:_WITHIN].replace("\u2019", "'")) is not None


def refuses_only(answer: str) -> bool:
    """Return whether an answer refuses, is short, and does not go on to help."""
    return len(answer) < _SHORT and refuses(answer) and _HELPS.search(answer) is None


def contains_accepted(answer: str, accepted: Sequence[str]) -> bool:
    """Return whether the answer has one of the accepted texts as whole words, in any case."""
    return any(
        re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.IGNORECASE) for text in accepted
    )


def first_sentence(text: str) -> str:
    """Return the text up to its first full stop before a space, or its first line break."""
    return re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]


# Characters of a text from which its language is guessed.
_LOOKED_AT = 400
# Different small words of its language that a text must have, and more than of any other language.
_ENOUGH, _ENOUGH_OF_MANY, _MANY = 2, 3, 20

_SCRIPTS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(f"[{ranges}]"))
    for name, ranges in (
        ("ja", "\u3040-\u30ff"), ("ko", "\uac00-\ud7af"), ("zh", "\u4e00-\u9fff"),
        ("el", "\u0370-\u03ff"), ("he", "\u0590-\u05ff"), ("ar", "\u0600-\u06ff"),
        ("hi", "\u0900-\u097f"), ("bn", "\u0980-\u09ff"), ("ta", "\u0b80-\u0bff"),
        ("th", "\u0e00-\u0e7f"), ("ru", "\u0400-\u04ff"),
    )
)  # fmt: skip
_LETTER = re.compile(r"[^\W\d_]")
_LETTERS = re.compile(r"[^\W\d_]+")
# A space for each character of ASCII that is no letter, and the lower case of those that are.
_ASCII = "".join(chr(code).lower() if chr(code).isalpha() else " " for code in range(128))
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
_LANGUAGES_OF: dict[str, list[str]] = {}
for _name, _words in _SMALL_WORDS.items():
    for _word in _words:
        _LANGUAGES_OF.setdefault(_word, []).append(_name)
_CYRILLIC_UKRAINIAN = re.compile("[іїєґІЇЄҐ]")


def language_of(text: str) -> str | None:
    """Guess the code of a text's language (ISO 639-1), one of `LANGUAGES`, or None.

    Short texts, code and names give None; a language that is not in this file gives None or a
    relative (Russian for Bulgarian).
    """
    text = text[:_LOOKED_AT]
    if not text.isascii():
        letters = len(_LETTER.findall(text))
        for name, script in _SCRIPTS:
            # Japanese is written with Chinese characters as well.
            share = 0.1 if name == "ja" else 0.4
            if letters and len(script.findall(text)) >= share * letters:
                return "uk" if name == "ru" and _CYRILLIC_UKRAINIAN.search(text) else name
    words = _words_in(text)
    counts: dict[str, int] = {}
    for word in words & _LANGUAGES_OF.keys():
        for name in _LANGUAGES_OF[word]:
            counts[name] = counts.get(name, 0) + 1
    *_, second, most = [0, 0, *sorted(counts.values())]
    enough = _ENOUGH if len(words) < _MANY else _ENOUGH_OF_MANY
    return max(counts, key=counts.__getitem__) if most >= enough and most > second else None


def _words_in(text: str) -> set[str]:
    """Return a text's words in lower case; a table finds those of ASCII sooner."""
    if text.isascii():
        return set(text.translate(_ASCII).split())
    return set(_LETTERS.findall(text.lower()))
