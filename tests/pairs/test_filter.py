"""Every filter of answers, the user's own check, verdicts, and what becomes of the two."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tandem.data.records import Origin, Turn
from tandem.errors import UserError
from tandem.pairs.filters import Candidate, Filters, Pair, UserCheck, first_pair, ranked_pair
from tandem.pairs.prompts import Prompt
from tandem.pairs.rankers import read_score, score_request
from tandem.recipe.pairs_settings import FilterSettings

PROMPT = Prompt(
    (Turn("system", "Be kind."), Turn("user", "Capital of France?")),
    "It is Paris.",
    ("Paris",),
    Origin("set.jsonl", 7),
)

ANY = Filters(FilterSettings())


def tried(
    *texts: str | Candidate,
    prompt: Prompt = PROMPT,
    keep: str = "different",
    check: UserCheck | None = None,
    **filters: Any,
) -> tuple[str, dict[str, int]]:
    """What is rejected, or why nothing is, and the counts."""
    dropped: Counter[str] = Counter()
    candidates = [one if isinstance(one, Candidate) else Candidate(one, True) for one in texts]
    wanted = Filters(FilterSettings(**filters), keep, check)
    found = first_pair(prompt, candidates, wanted, dropped)
    return (found.rejected if isinstance(found, Pair) else found), dict(dropped)


def test_which_candidate_is_rejected() -> None:
    texts = ("  ", "It is  Paris.", "Paris, I think.", Candidate(" Paris Paris ", False), "Rome")
    assert tried(*texts) == ("Paris, I think.", {"empty": 1, "same as chosen": 1})
    assert tried(*texts, keep="wrong") == (
        "Paris Paris", {"empty": 1, "same as chosen": 1, "right": 1},
    )  # fmt: skip
    assert tried() == ("no answer", {})
    assert tried("", " ") == ("empty", {"empty": 2})
    assert tried("", "It is Paris.")[0] == "no answer passes"


@pytest.mark.parametrize(
    ("filters", "passed_over", "taken", "reason"),
    [
        ({"max_similarity": 0.6}, "It is Paris, yes.", "It was Rome.", "nearly the same"),
        ({"drop_refusals": True}, "I'm sorry, but I cannot say.", "Rome.", "refusal"),
        ({"language": "en"}, "Das ist nicht die Stadt, und es ist auch kein Ort.", "Rome.",
         "in another language"),
        ({"max_characters": 10}, "It is perhaps Rome.", "Rome.", "too long"),
        ({"drop_unfinished": True}, Candidate("Rome", False), "Rome.", "not finished"),
    ],
)  # fmt: skip
def test_each_filter_passes_over_its_own(
    filters: dict[str, Any], passed_over: str | Candidate, taken: str, reason: str
) -> None:
    assert tried(passed_over, taken, **filters) == (taken, {reason: 1})
    text = passed_over if isinstance(passed_over, str) else passed_over.text
    assert tried(passed_over, taken) == (text, {})


def test_the_chosen_answer_gives_the_language() -> None:
    german = Prompt((Turn("user", "?"),), "Das ist nicht die Antwort, und sie ist auch kurz.", (),
                    Origin("f", 1))  # fmt: skip
    english, own = "This is what you have asked for.", "Und das ist auch nicht die Antwort."
    assert tried(english, own, prompt=german, language="same") == (own, {"in another language": 1})
    assert tried("Rome.", prompt=german, language="same")[0] == "Rome."


CHECK = """
def short(pair):
    assert set(pair) == {"system", "question", "chosen", "rejected"}
    pair["chosen"] = "changed"
    return len(pair["rejected"]) < 6

def why(pair):
    return True if pair["rejected"] == "Rome." else f"is  {pair['rejected']}"

def broken(pair):
    return pair["rejected"] / 2

def vague(pair):
    return None
"""


def test_the_users_check_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.py"
    path.write_text(CHECK)
    short = UserCheck(f"{path}:short")
    assert tried("Reykjavik.", "Rome.", check=short) == ("Rome.", {"check": 1})
    assert PROMPT.answer == "It is Paris."
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tried("Oslo.", "Rome.", check=UserCheck("mine:why")) == ("Rome.", {"check: is Oslo.": 1})
    before = short.identity
    path.write_text(CHECK + "\n")
    assert UserCheck(f"{path}:short").identity != before


def test_a_check_that_fails_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(CHECK)
    with pytest.raises(UserError, match=r"set.jsonl, row 7: .*raised TypeError: .*bad.py, line 11"):
        tried("Rome.", check=UserCheck(f"{path}:broken"))
    with pytest.raises(UserError, match=r"row 7: .* returned None, which is neither True, False"):
        tried("Rome.", check=UserCheck(f"{path}:vague"))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("mine.py", "does not name a function"),
        (":f", "does not name a function"),
        ("a.py:not a name", "does not name a function"),
        ("nowhere.py:f", "there is no file nowhere.py"),
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError"),
        ("json:no_such", "json has no function no_such"),
        ("json:__name__", "has no function"),
    ],
)
def test_a_check_that_is_none(place: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        UserCheck(place)


def test_a_check_that_does_not_parse(tmp_path: Path) -> None:
    (tmp_path / "no.py").write_text("def f(:\n")
    with pytest.raises(UserError, match="cannot be imported: SyntaxError"):
        UserCheck(f"{tmp_path / 'no.py'}:f")


def test_best_and_worst_make_the_pair() -> None:
    scored = [(Candidate(f"answer {n}", True), score) for n, score in enumerate((3, 9, 1, 9))]
    dropped: Counter[str] = Counter()
    found = ranked_pair(PROMPT, scored, 0, ANY, dropped)
    assert found == Pair(PROMPT, "answer 1", "answer 2")
    assert ranked_pair(PROMPT, scored, 8, ANY, dropped) == "scores too close"
    assert ranked_pair(PROMPT, scored[:1], 0, ANY, dropped) == "fewer than two answers to rank"
    same = [(Candidate("a b", True), 1.0), (Candidate("a  b", True), 2.0)]
    assert ranked_pair(PROMPT, same, 0, ANY, dropped) == "same as chosen"
    assert dropped == {
        "scores too close": 1, "fewer than two answers to rank": 1, "same as chosen": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7), (" 10.\n", 10), ("8/10", 8), ("Rating: 6", 6), ("7.5", 7.5), ("**9**", 9),
        ("I would say 4 out of 10", None), ("0", None), ("11", None), ("good", None), ("", None),
        ("3 or 4", None), ("10/10", 10), ("-5", None), ("1e5", None),
    ],
)  # fmt: skip
def test_verdicts(text: str, score: float | None) -> None:
    assert read_score(text) == score


def test_a_judge_is_asked_for_a_number() -> None:
    request = score_request(PROMPT, "Rome.", "max_completion_tokens")
    assert request.options == {"temperature": 0, "max_completion_tokens": 16}
    ((message),) = request.messages
    assert "[Question]\nBe kind.\n\nCapital of France?\n\n[Answer]\nRome.\n" in message["content"]
