"""What an answer says about itself: does it refuse?

One detector, for the checks of data sets and for the filters of pairs. English only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Refusals and disclaimers come at the beginning: further on, the same words are quoted, put into
# somebody's mouth, or said of a detail after an answer was given.
_WITHIN = 200
# An answer that refuses and is longer goes on to something, a safer answer for instance.
_SHORT = 600
_CANNOT = (
    r"(?:can(?:'t|not| not)|(?:am|'m) (?:currently )?(?:unable|not able) to"
    r"|(?:won't|will not)(?: be able to)?)"
)
# What one is asked for as an assistant. `I can't see the stage from here` is a story.
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
    r"(?<!\w)(?:"
    # An AI that says so. `As an AI researcher` is none, nor is the hero of a story.
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
    """Whether an answer begins as refusals and disclaimers of language models do, in English.

    `I must decline to answer that.` refuses, and `As an AI language model, I have no body, but
    ...` speaks of itself as an AI. Both count: neither is to be learnt, or preferred, unseen.
    """
    return _REFUSES.search(answer[:_WITHIN].replace("\u2019", "'")) is not None


def refuses_only(answer: str) -> bool:
    """Whether an answer refuses, is short, and does not go on to help."""
    return len(answer) < _SHORT and refuses(answer) and _HELPS.search(answer) is None


def contains_accepted(answer: str, accepted: Sequence[str]) -> bool:
    """Whether one of the accepted texts stands in the answer as whole words, in any case."""
    return any(
        re.search(rf"(?<!\w){re.escape(text)}(?!\w)", answer, re.IGNORECASE) for text in accepted
    )


def first_sentence(text: str) -> str:
    """The text up to its first full stop before a space, or its first line break."""
    return re.split(r"(?<=[.!?])\s|\n", text.strip(), maxsplit=1)[0]
