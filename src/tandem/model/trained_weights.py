"""Which weights are trained, saved and switched off: one class for each kind of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from tandem.model.unwrap import plain_model

Log = Callable[[str], None]


class TrainedWeights(Protocol):
    """One kind of training; `lora.adapter.LoraWeights` is one."""

    @property
    def leaves(self) -> Literal["adapter", "model"]:
        """What `save` writes: an adapter, which a merge follows, or a whole model."""
        ...

    def attach(
        self, model: Any, *, unreached: Sequence[str], added_ids: Sequence[int], log: Log
    ) -> Any:
        """Make a loaded model trainable: afterwards exactly what is trained requires a gradient.

        Args:
            model: a causal language model whose attention is set.
            unreached: linear layers that the model does not call, see `targets.unreached_layers`.
            added_ids: tokens whose embeddings are trained as well; their rows are there.
            log: told what is left out.
        """
        ...

    def save(self, model: Any, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write what is trained into an existing folder.

        `tensors` are the trained weights, whole, by the names of `trainable_parameters`; those of
        `model`, as `attach` returned it, may be sharded.
        """
        ...

    def finish(self, folder: Path) -> str:
        """Turn what `save` wrote into what a finished stage leaves, without its tokenizer.

        Returns a warning, or nothing.
        """
        ...

    def load(self, model: Any, folder: Path) -> None:
        """Put the trained weights back to what `save` wrote, bit for bit; but for `late` ones."""
        ...

    def late(self, folder: Path) -> dict[str, Tensor]:
        """The weights that `save` wrote and the engine puts back, once the reference is known.

        By the names of `trainable_parameters`.
        """
        ...

    def reference(self, model: Any) -> AbstractContextManager[None] | None:
        """A context in which the model computes as it did before training, without dropout.

        None where it cannot: its log-probs would have to come from a second model.
        """
        ...


def trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that the optimizer moves, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def hidden_matrices(model: Any) -> frozenset[str]:
    """The names of those of `trainable_parameters` that are matrices between layers.

    Not those of the input embeddings or the output head, whose rows are tokens.
    """
    ends = (plain_model(model).get_input_embeddings(), plain_model(model).get_output_embeddings())
    of_tokens = {id(p) for end in ends if end is not None for p in end.parameters()}
    parameters = trainable_parameters(model).items()
    return frozenset(n for n, p in parameters if p.dim() == 2 and id(p) not in of_tokens)


def set_rate_factor(parameter: Any, factor: float) -> None:
    """Let a trained parameter learn at so many times the learning rate, in every optimizer."""
    parameter.rate_factor = factor


def rate_factor(parameter: Tensor) -> float:
    """What `set_rate_factor` set; 1 otherwise."""
    factor: float = getattr(parameter, "rate_factor", 1.0)
    return factor


def keep_rate_factors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Give parameters the factors of those that they replaced, by name, and whether they decay."""
    for name, parameter in after.items():
        set_rate_factor(parameter, rate_factor(before[name]))
        set_decay(parameter, decays(before[name]))


def set_decay(parameter: Any, decays: bool) -> None:
    """Say whether an optimizer's weight decay acts on a parameter."""
    parameter.decays = decays


def decays(parameter: Tensor) -> bool:
    """What `set_decay` said; true otherwise."""
    return bool(getattr(parameter, "decays", True))
