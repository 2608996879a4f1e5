"""What a summary says of generated answers: their lengths and scores, on average."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from tandem.pairs.filters import Candidate, Pair


def length_figures(answers: Iterable[Candidate], pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the mean characters of all answers, of the chosen and of the rejected ones.

    There are pairs, and so there are answers.
    """
    return {
        "answers": statistics.fmean(len(answer.text.strip()) for answer in answers),
        "chosen": statistics.fmean(len(pair.chosen) for pair in pairs),
        "rejected": statistics.fmean(len(pair.rejected) for pair in pairs),
    }


def score_figures(scored: Sequence[tuple[Sequence[float], bool]]) -> dict[str, float]:
    """Return the mean score of the answers, its standard error, and those of pairs' two answers.

    Args:
        scored: the scores of each prompt's answers, and whether the prompt gave a pair.

    A prompt's answers are not independent, so a prompt counts as one: with the mean of its scores.
    `error` is left out where one prompt alone was scored; all is where none was.
    """
    means = [statistics.fmean(scores) for scores, _ in scored if scores]
    if not means:
        return {}
    figures = {"answers": statistics.fmean(means)}
    if len(means) > 1:
        figures["error"] = statistics.stdev(means) / math.sqrt(len(means))
    paired = [scores for scores, gave_pair in scored if gave_pair]
    if paired:
        figures["chosen"] = statistics.fmean(map(max, paired))
        figures["rejected"] = statistics.fmean(map(min, paired))
    return figures
