"""`fsdp2`: every layer's weights spread over the processes, gathered when the layer runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from tandem.errors import TandemError
from tandem.model.read_model import fill_layer
from tandem.model.trained_weights import keep_rate_factors, trainable_parameters
from tandem.model.unwrap import layers_of
from tandem.train.engines.engine import Engine, MakeOptimizer


class Fsdp2Engine(Engine):
    """torch's fully_shard by decoder layer; accelerate's plugin would silently be DDP on a CPU."""

    name = "fsdp2"
    sharded = True
    needs_group = True
    pieces = "shards"

    def _share(self, make_optimizer: MakeOptimizer) -> None:
        mesh = init_device_mesh(self.device.kind, (self.processes.count,))
        for layer in layers_of(self.model):
            fill_layer(self.model, layer)
            _spread(layer, mesh)
        _spread(self.scorer, mesh)
        whole = self.parameters
        self.parameters = trainable_parameters(self.model)  # spread ones have replaced the others
        keep_rate_factors(whole, self.parameters)
        self.optimizer = make_optimizer(self.parameters)

    def _put(self, values: Sequence[Tensor]) -> None:
        super()._put(values)
        for module in self.scorer.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what is still gathered of the values before

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self.scorer.set_requires_gradient_sync(last)  # the last one sums over the processes
        loss.backward()


def _spread(module: nn.Module, mesh: Any) -> None:
    fully_shard(module, mesh=mesh)
    if not isinstance(module, FSDPModule):
        raise TandemError(f"fsdp2 was asked for, but {type(module).__name__} was not spread")
    # Sums, not averages, and by plain sums: some backends have no other reduction.
    module.set_force_sum_reduction_for_comms(True)
    module.set_gradient_divide_factor(1.0)
