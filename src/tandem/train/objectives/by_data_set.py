"""The loss of each data set beside that of all, where a stage has several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tandem.data.encoded.example import Example
from tandem.train.objectives.objective import LossSums, Objective

# Before the name of a data set, in lines of metrics.
LOSS_OF = "loss_of/"
# The same of what its sum is divided by; no line has it.
_COUNT_OF = "count_of/"


class LossByDataSet:
    """An objective that reports the loss of each data set as well; the loss itself is untouched.

    A data set's loss is divided by its own share of the step's denominator: its trained tokens,
    pairs, rows or answers.

    Args:
        objective: of all examples.
        sizes: how many examples each data set has, by its name and in the examples' order.
    """

    def __init__(self, objective: Objective, sizes: Mapping[str, int]) -> None:
        self.couples = objective.couples
        self._objective, self._names = objective, list(sizes)
        self._ends = np.cumsum(list(sizes.values()))
        self._sets: Sequence[int] = ()  # of the step's examples
        self._shares: Sequence[int] = ()

    def begin(self, examples: Sequence[Example], indices: Sequence[int]) -> int:
        """See `Objective.begin`."""
        self._sets = np.searchsorted(self._ends, list(indices), side="right").tolist()
        denominator = self._objective.begin(examples, indices)
        self._shares = self._objective.shares()
        return denominator

    def shares(self) -> Sequence[int]:
        """See `Objective.shares`."""
        return self._shares

    def see_step(self, logps: Tensor) -> None:
        """See `Objective.see_step`."""
        self._objective.see_step(logps)

    def loss(
        self, logps: Tensor, weights: Tensor, members: Sequence[int], *, first_step: bool
    ) -> LossSums:
        """Sum of the losses, and the sum and the share of each data set."""
        result = self._objective.loss(logps, weights, members, first_step=first_step)
        each, sets = result.each, [self._sets[i] for i in members]
        owners = torch.zeros(len(each), dtype=torch.int64)  # padding adds nothing to any of them
        known = np.repeat(sets, result.parts)
        owners[: len(known)] = torch.from_numpy(known)
        shares = torch.zeros(len(self._names), dtype=each.dtype)
        for place, one in zip(members, sets, strict=True):
            shares[one] += self._shares[place]
        numbers = torch.arange(len(self._names), device=each.device)[:, None]
        losses = torch.where(owners.to(each.device) == numbers, each, 0.0).sum(dim=1)
        sums = dict(result.sums)
        for name, loss, share in zip(
            self._names, losses.unbind(), shares.to(each.device).unbind(), strict=True
        ):
            sums |= {f"{LOSS_OF}{name}": loss, f"{_COUNT_OF}{name}": share}
        return LossSums(result.loss, sums, each, result.parts)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The objective's metrics, and the loss of each data set that had records in the steps."""
        own, counts = {}, {}
        for name, value in sums.items():
            if name.startswith(_COUNT_OF):
                counts[name.removeprefix(_COUNT_OF)] = value
            elif not name.startswith(LOSS_OF):
                own[name] = value
        return self._objective.metrics(own) | {
            f"{LOSS_OF}{name}": sums[f"{LOSS_OF}{name}"] / counts[name]
            for name in self._names
            if counts.get(name)
        }


def by_data_set(objective: Objective, sizes: Mapping[str, int]) -> Objective:
    """The objective with the loss of each data set, if there are several."""
    return LossByDataSet(objective, sizes) if len(sizes) > 1 else objective
