"""Which answers refuse: one detector, tried on sentences and on real answers that people wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tandem.check.record_signs import REFUSAL, answer_signs
from tandem.data.text.text_traits import refuses, refuses_only
from tandem.pairs.filters import Candidate, against_answer
from tandem.recipe.pairs_settings import FilterSettings

REFUSALS = (
    "I must decline to answer that.",
    "I'm sorry, but I can't help with that.",
    "I\u2019m sorry, I cannot answer.",
    "I\u2019m sorry, but I cannot assist with this request.",
    "Sorry, I can't do that.",
    "As an AI language model, I do not have opinions.",
    "As an AI language model, I do not have feelings.",
    "As a responsible AI language model, I cannot fulfill this request.",
    "As an artificial intelligence, I have no body.",
    "I am just an AI, and I have never been to Rome.",
    "I apologize, but I am unable to open files.",
    "I am unable to assist with this request.",
    "I'm not able to help with that.",
    "I won't be able to help you with that.",
    "I cannot provide medical advice.",
    "I can not comply with this.",
    "I respectfully decline.",
    "I refuse to answer.",
    "I'd rather not discuss this.",
    "I'm not comfortable with writing this.",
    "That is not something I can help with.",
    "It would be inappropriate for me to say.",
    "My apologies, but I cannot share that.",
    "Unfortunately, I cannot tell.",
    "I'm afraid I can't do that.",
    "I'm sorry, as a language model I cannot see.",
    "Unable to comply.",
)
ANSWERS = (
    "I'm sorry to hear that you are ill.",
    "She said: sorry, we are closed.",
    "I can help you with that.",
    "You cannot divide by zero.",
    "Sorry is a short word.",
    "I cannot stress enough how good the bridge is.",
    "I can't see the stage from here, said the boy.",
    "The bridge is open.",
    "As an AI researcher, I would ask the model.",
    "I won't give up, I won't give in.",
    "I'm sorry, I'm not sure what you mean. Could you say more?",
    "Unfortunately, it is not possible to do this on Windows.",
    "A language model is a program that predicts words.",
    "x" * 300 + " I'm sorry, but I can't help.",
    "",
)


@pytest.mark.parametrize("answer", REFUSALS)
def test_refusals(answer: str) -> None:
    assert refuses(answer)


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers_that_do_not_refuse(answer: str) -> None:
    assert not refuses(answer)


@pytest.mark.parametrize("answer", [*REFUSALS, *filter(None, ANSWERS)])
def test_checks_of_data_and_filters_of_pairs_agree(answer: str) -> None:
    noted = REFUSAL in [sign for sign, _ in answer_signs(answer, "A question?")]
    dropped = against_answer(Candidate(answer, True), FilterSettings(drop_refusals=True))
    assert (dropped == "refusal") is noted is refuses(answer)


def test_a_short_refusal_that_helps_is_no_mere_refusal() -> None:
    assert refuses_only("I must decline to answer that.")
    assert not refuses_only("I can't help with that. However, a doctor can.")
    assert not refuses_only("I can't help with that. " + "Long. " * 200)


def test_real_answers(shared_data: Path) -> None:
    """Counts of what is found; a sample was read when they were written down.

    Of 3,652 answers of pairs 181 refuse or speak of themselves as an AI, of 11,117 of
    conversations 217.
    """
    answers = []
    for name in ("orca_dpo_pairs", "mixed_pairs"):
        for line in (shared_data / "pairs" / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            answers += [row["chosen"], row["rejected"]]
    found = [answer for answer in answers if refuses(answer)]
    assert (len(answers), len(found)) == (3652, 181)
