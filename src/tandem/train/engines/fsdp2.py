"""`fsdp2`: every layer's weights spread over the processes, gathered when the layer runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from tandem.data.batching.collate import MicroBatch
from tandem.errors import TandemError
from tandem.model.logprobs.sequence_logps import Scorer
from tandem.model.trained_weights import trainable_parameters
from tandem.model.unwrap import decoder_of
from tandem.train.engines.engine import MakeOptimizer
from tandem.train.engines.optimizer_state import load_state, state_of, whole
from tandem.train.optimizers import clip_and_step


class Fsdp2:
    """torch's fully_shard, one group a decoder layer and one for the rest.

    accelerate's plugin silently becomes DDP on a CPU, so this calls torch itself.

    Args:
        device: its type; one mesh dimension holds all processes.
        processes: how many there are.
    """

    name = "fsdp2"
    sharded = True
    needs_group = True

    def __init__(self, device: str, processes: int) -> None:
        self.device = device
        self.processes = processes
        self.config: Mapping[str, Any] = {}
        self.parameters: Mapping[str, Tensor] = {}

    def prepare(
        self, scorer: Scorer, make_optimizer: MakeOptimizer, max_grad_norm: float | None
    ) -> None:
        """See `Strategy.prepare`."""
        mesh = init_device_mesh(self.device, (self.processes,))
        for layer in layers_of(scorer.model):
            self._spread(layer, mesh)
        self._spread(scorer, mesh)
        self.scorer: Any = scorer
        self.parameters = trainable_parameters(scorer.model)
        self.max_grad_norm = max_grad_norm
        self.optimizer = make_optimizer(self.parameters.values())

    def score(self, batch: MicroBatch) -> Tensor:
        """See `Strategy.score`."""
        scored: Tensor = self.scorer(batch)
        return scored

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Strategy.backward`."""
        self.scorer.set_requires_gradient_sync(last)
        loss.backward()

    def reduce(self) -> None:
        """The last backward has done it."""

    def apply(self, learning_rate: float) -> float:
        """See `Strategy.apply`."""
        return clip_and_step(
            self.optimizer,
            self.parameters.values(),
            max_norm=self.max_grad_norm,
            learning_rate=learning_rate,
        )

    def trained(self) -> dict[str, Tensor]:
        """See `Strategy.trained`."""
        return {name: whole(p) for name, p in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Strategy.optimizer_state`."""
        return state_of(self.optimizer, self.parameters)

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Strategy.load_optimizer`."""
        load_state(self.optimizer, self.parameters, tensors)

    def _spread(self, module: nn.Module, mesh: Any) -> None:
        fully_shard(module, mesh=mesh)
        if not isinstance(module, FSDPModule):
            raise TandemError(f"fsdp2 was asked for, but {type(module).__name__} was not spread")
        # Sums, not averages, and by plain sums: some backends have no other reduction.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a causal language model, adapters injected or not."""
    unwrap: Any = getattr(model, "get_base_model", None)
    decoder: Any = decoder_of(model if unwrap is None else unwrap())
    layers = getattr(decoder, "layers", None)
    if layers is None:
        layers = getattr(decoder, "h", None)  # GPT-2's name
    return list(layers) if layers is not None else []
