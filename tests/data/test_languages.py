"""A language is told by script and small words, or not at all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tandem.data.text.text_traits import LANGUAGES, language_of


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("This is the first of the two answers that you have asked for.", "en"),
        ("Das ist nicht die Antwort auf die Frage, und sie wird auch nicht besser.", "de"),
        ("Il est dans la maison avec les enfants, mais ce n'est pas pour vous.", "fr"),
        ("El perro no es de los que están en una casa, pero es más grande.", "es"),
        ("Questo non è il libro che sono venuto a prendere, ma è come una storia.", "it"),
        ("Não é uma resposta para o menino, mas ele não sabe como dizer que são dois.", "pt"),
        ("Het is niet een van de boeken die op de tafel staan, maar dat is er ook.", "nl"),
        ("Det är inte en av dem som har varit på marknaden med sina barn.", "sv"),
        ("To nie jest dobra odpowiedź na pytanie, ale już się o tym mówi.", "pl"),
        ("Bu çok güzel bir ev ve benim için daha iyi olan var.", "tr"),
        ("Это не ответ на вопрос.", "ru"),
        ("Αυτή είναι η απάντηση.", "el"),
        ("זאת התשובה", "he"),
        ("هذا هو الجواب", "ar"),
        ("यह उत्तर है", "hi"),
        ("นี่คือคำตอบ", "th"),
        ("これが答えです。", "ja"),
        ("이것이 답입니다.", "ko"),
        ("这就是答案。", "zh"),
        ("Paris.", None),
        ("42", None),
        ("", None),
        ("for (int i = 0; i < n; i++) { o[i] = z * i; }", None),
    ],
)
def test_languages(text: str, language: str | None) -> None:
    assert language_of(text) == language
    assert language is None or language in LANGUAGES


def test_the_languages_of_recipes_are_those_that_can_be_told() -> None:
    from typing import get_args

    from tandem.recipe.choices import Language

    assert set(get_args(Language)) == set(LANGUAGES)


def test_real_english_is_not_taken_for_another_language(shared_data: Path) -> None:
    """Instruction data of which all but a few answers is English, code or numbers."""
    guesses: Counter[str | None] = Counter()
    with (shared_data / "conversations" / "slimorca_format.jsonl").open() as file:
        for line in file:
            turns = json.loads(line)["conversations"]
            guesses.update(language_of(t["value"]) for t in turns if t["from"] == "gpt")
    # Of the ten others seven are right; docs/guide/pairs.md has these figures.
    assert (guesses.total(), guesses[None]) == (11117, 1384)
    assert guesses.total() - guesses["en"] - guesses[None] == 10


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the name of the river that goes through it?", "en"),
        ("Wie heißt der Fluss, und wo ist er?", "de"),
        ("Quelle est la rivière qui passe dans la ville ?", "fr"),
        ("¿Cómo se llama el río que pasa por la ciudad?", "es"),
        ("Come si chiama il fiume che attraversa la città?", "it"),
        ("Hoe heet de rivier die door het land loopt?", "nl"),
        ("Как называется река?", "ru"),
        ("Як називається річка, її ім'я?", "uk"),
        ("这条河叫什么名字？", "zh"),
        ("この川の名前は何ですか", "ja"),
        ("이 강의 이름은 무엇입니까", "ko"),
        ("ما اسم هذا النهر؟", "ar"),
        ("x = f(y) + 3", None),
        ("Paris", None),
        ("", None),
    ],
)
def test_short_questions(text: str, language: str | None) -> None:
    assert language_of(text) == language
