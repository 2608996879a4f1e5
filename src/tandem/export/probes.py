"""Texts and conversations by which a file is compared with the model it was made of."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.data.records import Turn

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps for 7 hours.",
    "Once upon a time there was a small village by the sea. Everyone who lived there knew how "
    "to mend a net, how to read the clouds and when to stay at home.",
    "def mean(values):\n    total = 0.0\n\tfor v in values:  # 1234567 of them\n        total += v"
    "\n    return total / max(len(values), 1)\n\n\nprint(mean([1, 2.5, -30]))",
    "I'm sure they'll say it's DON'T, we've, you're; isn't it?  Two  spaces,   three.\r\n\r\nEnd",
    "Straße, naïve café, Ελληνικά, русский язык, 日本語のテキスト、한국어, עברית",
    "🙂👩‍👩‍👧 100% €3.50 ½ x² — “quoted” … <tag attr='1'> {json: [true, null]} $E=mc^2$",
    " leading and trailing spaces ",
    "\n\n\tindented\n \n  \nfirst\n",
    "Supercalifragilisticexpialidocious2024-05-17T12:30:00Z http://example.com/a?b=c&d=%20",
    "a",
)
"""Texts that tokenizers cut in many ways: contractions, digits, blanks, scripts, signs, bytes."""

RARE = (
    "हिन्दी में लिखा हुआ, ภาษาไทย, العَرَبِيَّة",
    "cafe\u0301 in decomposed form, A\u030angstro\u0308m",
    "iPhoneЖЫжы mixedCaseΑΒΓαβγ",
)
"""Texts with signs that combine and mixed alphabets, which llama.cpp may cut otherwise."""

_QUESTION, _ANSWER = "What is the capital of France?", "The capital of France is Paris."
_SYSTEM = "You answer in one sentence."

CONVERSATIONS: tuple[tuple[Turn, ...], ...] = (
    (Turn("user", _QUESTION),),
    (Turn("system", _SYSTEM), Turn("user", _QUESTION)),
    (Turn("user", _QUESTION), Turn("assistant", _ANSWER), Turn("user", "And of Italy?")),
    (
        Turn("system", _SYSTEM),
        Turn("user", "Write\n\n  two lines:\n1. a\n2. b"),
        Turn("assistant", "a\nb"),
        Turn("user", "Again, 10 times!"),
        Turn("assistant", "No."),
        Turn("user", "Why not?"),
    ),
    (Turn("user", "Ça va? 你好 🙂 <b>x</b>"),),
)
"""Conversations that end with a question, with and without a system turn, one turn and several."""

PADDED: tuple[Turn, ...] = (
    Turn("user", "  padded with blanks \n"), Turn("assistant", " kept? "), Turn("user", " ok "),
)  # fmt: skip
"""A conversation whose messages have blanks around them, which some templates take away."""

FINISHED: tuple[tuple[Turn, ...], ...] = (
    (Turn("user", _QUESTION), Turn("assistant", _ANSWER)),
    (Turn("system", _SYSTEM), Turn("user", _QUESTION), Turn("assistant", _ANSWER)),
)
"""Conversations that end with an answer."""


def sequences(
    texts: Sequence[Sequence[int]], conversation: Sequence[int], parameters: int
) -> list[list[int]]:
    """Token ids of a few probe texts and a conversation; fewer tokens of large models.

    A few tokens of a large model show the same, and take as long as its weights are read.
    """
    most = 48 if parameters < 500_000_000 else 16
    chosen = [list(ids)[:most] for ids in (*texts[:3], conversation)]
    return [ids for ids in chosen if len(ids) > 1]
