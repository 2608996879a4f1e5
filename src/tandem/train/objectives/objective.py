"""What the training loop knows of a stage's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tandem.data.encoded.example import Example


@dataclass(frozen=True)
class LossSums:
    """A micro-batch's share of a step: the loss to differentiate, not yet divided, and sums.

    The sums, the loss among them, are scalars of one dtype on the device: reading one would wait.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    each: Tensor  # [N]: the parts that the loss is the sum of, without gradients
    parts: Sequence[int]  # how many of them each of the micro-batch's examples has; padding follows


class Objective(Protocol):
    """Turns sequence log-probs into losses; the loop knows nothing else about a stage."""

    # whether an example's loss depends on the others of its step: `see_step` is then called before
    # the step's first `loss`
    couples: bool

    def begin(self, examples: Sequence[Example], indices: Sequence[int]) -> int:
        """Begin a step of some examples.

        Returns what the step's summed loss is divided by, known before its first forward.
        """
        ...

    def shares(self) -> Sequence[int]:
        """What each example of the step that began last adds to what `begin` returned."""
        ...

    def see_step(self, logps: Tensor) -> None:
        """Take the log-probs of a whole step, of all processes, without gradients [S].

        Their examples are those that `BuiltObjective.observed` has of the step's indices.
        """
        ...

    def loss(
        self, logps: Tensor, weights: Tensor, members: Sequence[int], *, first_step: bool
    ) -> LossSums:
        """The loss of a micro-batch of the step that began last.

        Args:
            logps: of its sequences [S].
            weights: 1, or 0 for a sequence that is only padding [S].
            members: positions of its examples in the step.
            first_step: whether nothing is trained yet.
        """
        ...

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Named averages from sums over one or more steps, `count` (denominators) among them."""
        ...


def sequence_tokens(tree: Example) -> list[int]:
    """Targets of each of a tree's sequences, those of the prefix counted for each."""
    shared = int(tree.prefix.trained.sum())
    return [shared + int(branch.trained.sum()) for branch in tree.branches]


def trained_tokens(tree: Example) -> int:
    """Targets of a tree over all its sequences."""
    return sum(sequence_tokens(tree))
