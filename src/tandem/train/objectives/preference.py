"""Losses that compare answers to one prompt: pairs, every pair of a row, or rows as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tandem.data.encoded.example import Example
from tandem.losses.answers import AnswerLogps
from tandem.train.objectives.answers import Answers, check_start, part_of
from tandem.train.objectives.mixture import Mixture
from tandem.train.objectives.objective import LossSums


@dataclass(frozen=True)
class _Pairs:
    """P pairs of the answers of some examples: places among those answers."""

    better: NDArray[np.int64]  # [P]
    worse: NDArray[np.int64]  # [P]
    counts: NDArray[np.int64]  # [n]: pairs of each example
    plain: bool  # whether every example has two answers, the better one first

    @classmethod
    def of(cls, answers: Answers, indices: Sequence[int]) -> _Pairs:
        """All pairs of each example of which one answer has a higher score."""
        better, worse, counts, start = [], [], [], 0
        for index in indices:
            scores = answers.scores[answers.first[index] : answers.first[index + 1]]
            above, below = np.nonzero(scores[:, None] > scores[None, :])
            better.append(above + start)
            worse.append(below + start)
            counts.append(len(above))
            start += len(scores)
        first = np.concatenate(better)
        plain = start == 2 * len(indices) and np.array_equal(first, np.arange(0, start, 2))
        return cls(first, np.concatenate(worse), np.array(counts), plain)

    def places(self, like: Tensor) -> tuple[Any, Any]:
        """Where the better and the worse answers are among log-probs, as the device takes it."""
        if self.plain:  # a declared shape stays one, and its padding makes pairs of its own
            return slice(0, None, 2), slice(1, None, 2)
        better, worse = (
            torch.from_numpy(part).to(like.device) for part in (self.better, self.worse)
        )
        return better, worse


class PreferenceObjective:
    """A preference loss averaged over the step's pairs, or over its rows.

    Args:
        mixture: the losses.
        answers: of all examples.
        relative_tolerance: of the step-0 check, what the precision in use explains.
    """

    def __init__(self, mixture: Mixture, answers: Answers, relative_tolerance: float) -> None:
        self.couples = mixture.couples
        self._mixture, self._answers, self._tolerance = mixture, answers, relative_tolerance
        self._step: Sequence[int] = ()
        self._pairs: _Pairs
        self._step_tokens = 1.0
        self._statistics: tuple[Tensor | None, ...] = ()

    def begin(self, examples: Sequence[Example], indices: Sequence[int]) -> int:
        """The step's pairs; its rows if they are compared as a whole."""
        del examples
        self._step = indices
        self._pairs = pairs = _Pairs.of(self._answers, indices)
        tokens = self._answers.tokens[self._answers.numbers(indices)[pairs.better]]
        self._step_tokens = float(tokens.mean())
        return len(indices) if self._mixture.compared == "rows" else len(pairs.better)

    def shares(self) -> Sequence[int]:
        """Each example's pairs; one for each if rows are compared as a whole."""
        rows = self._mixture.compared == "rows"
        return [1] * len(self._step) if rows else self._pairs.counts.tolist()

    def see_step(self, logps: Tensor) -> None:
        """Compute the losses' statistics of a step."""
        answers = self._given(logps, torch.ones_like(logps), self._step)
        better, worse = self._pairs.places(logps)
        self._statistics = self._mixture.statistics(
            part_of(answers, better), part_of(answers, worse)
        )

    def loss(
        self, logps: Tensor, weights: Tensor, members: Sequence[int], *, first_step: bool
    ) -> LossSums:
        """Sum of the losses; in the first step, the step-0 check as well."""
        indices = [self._step[i] for i in members]
        answers = self._given(logps, weights, indices)
        if first_step and answers.reference is not None:
            check_start(answers.policy.detach(), answers.reference, self._tolerance)
        pairs = _Pairs.of(self._answers, indices)
        better, worse = pairs.places(logps)
        chosen, rejected = part_of(answers, better), part_of(answers, worse)
        of_pairs = weights[better]
        if self._mixture.compared == "rows":
            return self._of_rows(answers, weights, indices, (chosen, rejected, of_pairs, pairs))
        value, parts = self._mixture.losses(
            chosen, rejected, statistics=self._statistics_of(members, of_pairs)
        )
        each = value * of_pairs
        loss = each.sum()
        metrics = {**self._metrics(chosen, rejected), **parts}
        sums = {name: (metric * of_pairs).sum() for name, metric in metrics.items()}
        counts = pairs.counts.tolist()
        return LossSums(loss, {"loss": loss.detach(), **sums}, each.detach(), counts)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over pairs; those of rewards have TRL's names."""
        return {name: value / sums["count"] for name, value in sums.items() if name != "count"}

    def _given(self, logps: Tensor, weights: Tensor, indices: Sequence[int]) -> AnswerLogps:
        """A micro-batch's answers, padded like its log-probs."""
        numbers = self._answers.numbers(indices)
        return self._answers.logps(logps, weights > 0, numbers, self._step_tokens)

    def _statistics_of(self, members: Sequence[int], like: Tensor) -> tuple[Tensor | None, ...]:
        """The step's statistics; of one with a row for each pair, the micro-batch's rows."""
        if not self._statistics:
            return ()
        starts = np.concatenate([[0], np.cumsum(self._pairs.counts)])
        rows = np.zeros(len(like), dtype=np.int64)
        own = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in members])
        rows[: len(own)] = own
        places = torch.from_numpy(rows).to(like.device)
        return tuple(
            None if value is None else value[places] if value.dim() else value
            for value in self._statistics
        )

    def _of_rows(
        self,
        answers: AnswerLogps,
        weights: Tensor,
        indices: Sequence[int],
        paired: tuple[AnswerLogps, AnswerLogps, Tensor, _Pairs],
    ) -> LossSums:
        """Sum of the losses of whole rows; a row's metrics are means over its pairs."""
        chosen, rejected, of_pairs, pairs = paired
        values, every, start = [], [], 0
        for index, count in zip(indices, self._answers.counts(indices), strict=True):
            row = slice(start, start + count)
            scores = self._answers.scores[self._answers.numbers([index])]
            scored = torch.from_numpy(scores).to(answers.policy.dtype).to(answers.policy.device)
            value, parts = self._mixture.losses(part_of(answers, row), scored)
            values.append(value * weights[start])
            every.append({name: part * weights[start] for name, part in parts.items()})
            start += count
        each = torch.stack(values)
        loss = each.sum()
        share = torch.from_numpy(np.repeat(1 / pairs.counts, pairs.counts)).to(of_pairs)
        sums = {
            name: (metric * of_pairs * share).sum()
            for name, metric in self._metrics(chosen, rejected).items()
        }
        sums |= {name: torch.stack([one[name] for one in every]).sum() for name in every[0]}
        counts = [1] * len(values)
        return LossSums(loss, {"loss": loss.detach(), **sums}, each.detach(), counts)

    def _metrics(self, chosen: AnswerLogps, rejected: AnswerLogps) -> dict[str, Tensor]:
        """What to report of each pair [P]."""
        logps = {
            "logps/chosen": chosen.policy.detach(),
            "logps/rejected": rejected.policy.detach(),
        }
        reward, beta = self._mixture.reward, self._mixture.beta
        if reward is None:
            return logps
        of_chosen, of_rejected = (
            beta * getattr(answers, reward).detach() for answers in (chosen, rejected)
        )
        margins = of_chosen - of_rejected
        compared = {
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).to(margins.dtype),
        }
        if reward != "ratio":  # without a reference, a reward alone says nothing
            return compared | logps
        return {"rewards/chosen": of_chosen, "rewards/rejected": of_rejected} | compared | logps
