"""Rows that hold a better and a worse answer, for DPO."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter

from tandem.data.formats import turns
from tandem.data.formats.format import Fields, InvalidRecord, Reader, spelt, text
from tandem.data.formats.turns import check_order, prompt_of, said
from tandem.data.records import Origin, Preference, Record, Turn


def read_orca_pair(fields: Fields, origin: Origin) -> list[Preference]:
    """`system`, `question`, `chosen`, `rejected`, all texts."""
    prompt = prompt_of(fields.get("system"), text(fields, "question"))
    return [pair(prompt, text(fields, "chosen"), text(fields, "rejected"), origin)]


def read_explicit_pair(fields: Fields, origin: Origin) -> list[Preference]:
    """`prompt`, `chosen`, `rejected`, texts or messages."""
    return [_answers_to(turns.prompt_in(fields), fields, origin)]


def read_alpaca_pair(fields: Fields, origin: Origin) -> list[Preference]:
    """Alpaca's `instruction` and `input` with two answers."""
    return [_answers_to(turns.instruction_in(fields), fields, origin)]


def read_sharegpt_pair(fields: Fields, origin: Origin) -> list[Preference]:
    """`conversations` that end with a question, and two answers, texts or turns."""
    prompt = turns.turns_in(fields.get("conversations"), "conversations", "from", "value")
    return [_answers_to(turns.after_system(fields, prompt), fields, origin)]


def read_implicit_pair(fields: Fields, origin: Origin) -> list[Preference]:
    """Two dialogues in `chosen` and `rejected` that differ in the last answer."""
    chosen, rejected = (turns.dialogue_in(fields, key) for key in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise InvalidRecord("chosen and rejected follow different prompts")
    return [pair(chosen[:-1], said(chosen[-1]), said(rejected[-1]), origin)]


def pair(prompt: tuple[Turn, ...], chosen: str, rejected: str, origin: Origin) -> Preference:
    """Return a preference pair; raise `InvalidRecord` for turns or answers that make none."""
    check_order((*prompt, Turn("assistant", chosen)))
    if not rejected.strip():
        raise InvalidRecord("empty answer", "rejected")
    if chosen.strip() == rejected.strip():
        raise InvalidRecord("identical answers")
    return Preference(prompt, (chosen, rejected), origin)


def _answers_to(prompt: tuple[Turn, ...], fields: Fields, origin: Origin) -> Preference:
    chosen_prompt, chosen = turns.answer_in(fields, "chosen", prompt)
    rejected_prompt, rejected = turns.answer_in(fields, "rejected", prompt)
    if chosen_prompt != rejected_prompt:
        raise InvalidRecord("chosen and rejected follow different prompts")
    return pair(chosen_prompt, chosen, rejected, origin)


def answers_as_texts(fields: Fields) -> bool:
    """Return whether a row's better answer is a text, not messages that bring their prompt."""
    return not isinstance(fields.get("chosen"), list)


# distilabel's edition of orca_dpo_pairs; Argilla's edition of UltraFeedback.
read_input_pair = spelt(read_orca_pair, question="input")
read_response_pair = spelt(read_alpaca_pair, chosen="chosen_response", rejected="rejected_response")


Scored = tuple[int, float, Fields]


def read_best_vs_worst(fields: Fields, origin: Origin) -> list[Preference | InvalidRecord]:
    """Pair the best answer with the worst, one pair a row."""
    prompt, ranked, verdicts = _ranked(fields)
    return [*verdicts, _against(prompt, ranked[0], ranked[-1], origin)]


def read_best_vs_rest(fields: Fields, origin: Origin) -> list[Preference | InvalidRecord]:
    """Pair the best answer with each of the others, in the row's order."""
    prompt, (best, *rest), verdicts = _ranked(fields)
    rest.sort(key=itemgetter(0))
    return [*verdicts, *(_against(prompt, best, one, origin) for one in rest)]


def read_all_pairs(fields: Fields, origin: Origin) -> list[Preference | InvalidRecord]:
    """Read all answers of a row with their scores, as one record."""
    prompt, ranked, verdicts = _ranked(fields)
    return [*verdicts, *_whole_row(prompt, ranked, origin)]


def read_best_vs_all(fields: Fields, origin: Origin) -> list[Preference | InvalidRecord]:
    """Read all answers of a row as one record, in which the best one is better than the others."""
    prompt, ranked, verdicts = _ranked(fields)
    best, *others = ranked
    ties = [one for one in others if one[1] == best[1]]
    verdicts += [
        InvalidRecord(_SAME_SCORE, f"answers {best[0]} and {one[0]}: {one[1]:g}") for one in ties
    ]
    worse = [(place, 0.0, one) for place, score, one in others if score < best[1]]
    return [*verdicts, *_whole_row(prompt, [(best[0], 1.0, best[2]), *worse], origin)]


_SAME_SCORE = "both answers have the same score"


def _whole_row(
    prompt: tuple[Turn, ...], ranked: Sequence[Scored], origin: Origin
) -> list[Preference | InvalidRecord]:
    """Return a row's record, and a verdict on each answer that cannot be compared."""
    results: list[Preference | InvalidRecord] = []
    kept: dict[str, tuple[int, float, str]] = {}
    for place, score, one in ranked:
        try:
            answer = text(one, "response")
            check_order((*prompt, Turn("assistant", answer)))
        except InvalidRecord as verdict:
            results.append(InvalidRecord(verdict.reason, f"answer {place}"))
            continue
        if (same := kept.get(answer.strip())) is not None:
            results.append(InvalidRecord("identical answers", f"answers {same[0]} and {place}"))
        else:
            kept[answer.strip()] = (place, score, answer)
    scores = tuple(score for _, score, _ in kept.values())
    if len(set(scores)) < 2:
        results.append(InvalidRecord("fewer than two answers that can be compared"))
    else:
        answers = tuple(answer for _, _, answer in kept.values())
        results.append(Preference(prompt, answers, origin, scores=scores))
    return results


def read_scored_answers(read: Reader) -> Reader:
    """Return a reader of rows with `prompt`, `answers` and `scores`, lists of the same length."""

    def reader(fields: Fields, origin: Origin) -> list[Record | InvalidRecord]:
        answers, scores = fields.get("answers"), fields.get("scores")
        if not isinstance(answers, list) or not isinstance(scores, list):
            raise InvalidRecord("`answers` and `scores` are not both lists")
        if len(answers) != len(scores):
            detail = f"{len(answers)} and {len(scores)}"
            raise InvalidRecord("`answers` and `scores` have different lengths", detail)
        if not all(isinstance(answer, str) for answer in answers):
            raise InvalidRecord("`answers` holds something that is not a text")
        completions = [
            {"response": answer, "overall_score": score}
            for answer, score in zip(answers, scores, strict=True)
        ]
        system = fields.get("system")
        row = {"instruction": text(fields, "prompt"), "completions": completions, "system": system}
        return list(read(row, origin))

    return reader


def _ranked(fields: Fields) -> tuple[tuple[Turn, ...], list[Scored], list[InvalidRecord]]:
    """Return prompt, answers by falling score (the earlier first), a verdict for each unscored."""
    prompt = prompt_of(fields.get("system"), text(fields, "instruction"))
    completions = fields.get("completions")
    if not isinstance(completions, list) or not completions:
        raise InvalidRecord("`completions` is not a list of answers")
    if not all(isinstance(one, Mapping) for one in completions):
        raise InvalidRecord("`completions` holds an answer that is not an object")
    # One measure for all of a row: scores of different scales cannot be compared.
    measured = [
        [_number(one.get("overall_score")) for one in completions],
        [_number(one.get("fine-grained_score")) for one in completions],
        [_mean_rating(one) for one in completions],
    ]
    scores = max(measured, key=lambda measure: sum(score is not None for score in measure))
    ranked = [
        (place, score, one)
        for place, (score, one) in enumerate(zip(scores, completions, strict=True), start=1)
        if score is not None
    ]
    if len(ranked) < 2:
        raise InvalidRecord(
            "fewer than two answers have a score", f"{len(ranked)} of {len(scores)}"
        )
    missing = [place for place, score in enumerate(scores, start=1) if score is None]
    verdicts = [InvalidRecord("an answer without a score", f"answer {at}") for at in missing]
    ranked.sort(key=lambda one: (-one[1], one[0]))
    _check_agreement(ranked[0], ranked[-1], measured)
    return prompt, ranked, verdicts


def _check_agreement(
    best: Scored, worst: Scored, measured: Sequence[Sequence[float | None]]
) -> None:
    """Raise `InvalidRecord` where another measure gives the best answer the lowest score.

    UltraFeedback has rows in which an `overall_score` of 1 was written down as 10.
    """
    for scores in measured:
        known = [score for score in scores if score is not None]
        first, last = scores[best[0] - 1], scores[worst[0] - 1]
        if first is None or last is None or len(known) < len(scores):
            continue
        if first == min(known) and first < last:
            raise InvalidRecord(
                "its scores contradict each other",
                f"answer {best[0]}: {best[1]:g} by one measure, {first:g}, the least, by another",
            )


def _against(
    prompt: tuple[Turn, ...], best: Scored, other: Scored, origin: Origin
) -> Preference | InvalidRecord:
    where = f"answers {best[0]} and {other[0]}"
    if best[1] == other[1]:
        return InvalidRecord(_SAME_SCORE, f"{where}: {best[1]:g}")
    try:
        return pair(prompt, text(best[2], "response"), text(other[2], "response"), origin)
    except InvalidRecord as verdict:
        return InvalidRecord(verdict.reason, where)


def _mean_rating(completion: Fields) -> float | None:
    """Return the mean rating of the aspects that have one."""
    aspects = completion.get("annotations")
    if not isinstance(aspects, Mapping):
        return None
    numbers = [_number(one.get("Rating")) for one in aspects.values() if isinstance(one, Mapping)]
    ratings = [one for one in numbers if one is not None]
    return sum(ratings) / len(ratings) if ratings else None


def _number(value: object) -> float | None:
    """Return a finite number, also one written as a text, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
