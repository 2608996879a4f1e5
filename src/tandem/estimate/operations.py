"""Floating-point operations of a training stage, a multiply-add being two."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.estimate.shape import ModelShape
from tandem.estimate.work import Work


@dataclass(frozen=True)
class Operations:
    """What a stage computes, part by part.

    With T tokens fed, P multiplications of a token in frozen linear layers, L in the adapter, A
    visible pairs of a attention multiplications, and N trained tokens under a head of V x H:

    Attributes:
        forward: 2(P + L)T + 2aA + 2NVH.
        backward: 2PT (frozen weights have no gradient) + 4LT + 4aA + 2NVH.
        recomputed: with gradient checkpointing, the layers' forward once more: 2(P + L)T + 2aA.
        reference: DPO's pass without the adapter over all records, once: 2PT + 2aA + 2NVH.
    """

    forward: float
    backward: float
    recomputed: float
    reference: float

    @property
    def training(self) -> float:
        """Everything but the reference pass."""
        return self.forward + self.backward + self.recomputed

    @property
    def total(self) -> float:
        """Everything."""
        return self.training + self.reference

    @property
    def reference_share(self) -> float:
        """The reference pass's share of everything."""
        return self.reference / self.total


def count_operations(
    shape: ModelShape, work: Work, *, reference: bool, checkpointing: bool
) -> Operations:
    """The operations of a stage.

    Args:
        shape: of the model with its adapter.
        work: what is fed.
        reference: whether there is a reference pass.
        checkpointing: whether activations are computed once more in the backward.
    """
    linear, adapter = 2.0 * shape.linear * work.tokens, 2.0 * shape.adapter * work.tokens
    attention = 2.0 * shape.attention * work.visible
    head = 2.0 * shape.head * work.targets
    return Operations(
        forward=linear + adapter + attention + head,
        backward=linear + 2 * adapter + 2 * attention + head,
        recomputed=linear + adapter + attention if checkpointing else 0.0,
        reference=2.0 * shape.linear * work.reference_tokens
        + 2.0 * shape.attention * work.reference_visible
        + 2.0 * shape.head * work.reference_targets
        if reference
        else 0.0,
    )
