"""Losses of single answers that are good or bad."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tandem.data.encoded.example import Example
from tandem.train.objectives.answers import Answers, check_start
from tandem.train.objectives.mixture import Mixture
from tandem.train.objectives.objective import LossSums


class LabelledObjective:
    """A loss of labelled answers averaged over the step.

    Args:
        mixture: the losses.
        answers: of all examples, one each; a score of 1 is a good one's.
        mismatched: what the statistic of a step is of: each prompt with another prompt's answer.
        relative_tolerance: of the step-0 check, what the precision in use explains.
    """

    def __init__(
        self, mixture: Mixture, answers: Answers, mismatched: Answers, relative_tolerance: float
    ) -> None:
        self.couples = mixture.couples
        self._mixture, self._answers, self._mismatched = mixture, answers, mismatched
        self._tolerance = relative_tolerance
        self._step: Sequence[int] = ()
        self._statistics: tuple[Tensor | None, ...] = ()

    def begin(self, examples: Sequence[Example], indices: Sequence[int]) -> int:
        """The step's answers."""
        del examples
        self._step = indices
        return len(indices)

    def shares(self) -> Sequence[int]:
        """One for each answer."""
        return [1] * len(self._step)

    def see_step(self, logps: Tensor) -> None:
        """Estimate the divergence from answers to other prompts."""
        real, numbers = torch.ones_like(logps) > 0, self._mismatched.numbers(self._step)
        answers = self._mismatched.logps(logps, real, numbers, 1.0)
        self._statistics = self._mixture.statistics(answers)

    def loss(
        self, logps: Tensor, weights: Tensor, members: Sequence[int], *, first_step: bool
    ) -> LossSums:
        """Sum of the answers' losses; in the first step, the step-0 check as well."""
        numbers = self._answers.numbers([self._step[i] for i in members])
        answers = self._answers.logps(logps, weights > 0, numbers, 1.0)
        if first_step and answers.reference is not None:
            check_start(answers.policy.detach(), answers.reference, self._tolerance)
        labels = torch.zeros(len(logps), dtype=torch.bool)
        labels[: len(numbers)] = torch.from_numpy(self._answers.scores[numbers] > 0.5)
        good = labels.to(logps.device)
        value, parts = self._mixture.losses(answers, good, statistics=self._statistics)
        each = value * weights
        loss = each.sum()
        sums = {name: (part * weights).sum() for name, part in parts.items()}
        reward, policy = self._mixture.beta * answers.ratio.detach(), answers.policy.detach()
        for side, whose in (("chosen", weights * good), ("rejected", weights * ~good)):
            sums[f"count/{side}"] = whose.sum()
            sums[f"rewards/{side}"] = (reward * whose).sum()
            sums[f"logps/{side}"] = (policy * whose).sum()
        for part, known in zip(self._mixture.parts, self._statistics, strict=False):
            if known is not None:
                sums[f"divergence/{part.loss.name}"] = known * weights.sum()
        counts = [1] * len(members)
        return LossSums(loss, {"loss": loss.detach(), **sums}, each.detach(), counts)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over answers; those of rewards and log-probs over good ones, and over bad ones."""
        metrics = {}
        for name, value in sums.items():
            side = name.rpartition("/")[2]
            if name.startswith(("rewards/", "logps/")):
                count = sums[f"count/{side}"]
                if count:
                    metrics[name] = value / count
            elif not name.startswith("count"):
                metrics[name] = value / sums["count"]
        if "rewards/chosen" in metrics and "rewards/rejected" in metrics:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        return metrics
