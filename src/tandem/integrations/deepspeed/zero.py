"""`deepspeed-zero2` and `deepspeed-zero3`: DeepSpeed spreads the optimizer, or the weights too."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tandem.data.batching.collate import MicroBatch
from tandem.errors import TandemError
from tandem.model.logprobs.sequence_logps import Scorer
from tandem.model.trained_weights import trainable_parameters
from tandem.train.engines.engine import MakeOptimizer
from tandem.train.engines.optimizer_state import by_parameter
from tandem.train.engines.replicated import FlatGradients, HandOver
from tandem.train.optimizers import set_rate


class Zero2:
    """ZeRO stage 1 or 2 (arXiv 1910.02054): optimizer and reduced gradients are spread.

    DeepSpeed is given the trained parameters alone, and their gradients once a step: it would
    otherwise exchange them after every micro-batch, and all processes would have to run equally
    many. The model stays whole in every process, and is none of DeepSpeed's business.

    Args:
        config: for DeepSpeed; see `deepspeed_config`.
        device: its type.
    """

    sharded = False
    needs_group = True

    def __init__(self, config: Mapping[str, Any], device: str) -> None:
        self.stage = int(config["zero_optimization"]["stage"])
        self.name = f"deepspeed-zero{self.stage}"
        self.config = config
        self.device = device
        self.parameters: Mapping[str, Tensor] = {}

    def prepare(
        self, scorer: Scorer, make_optimizer: MakeOptimizer, max_grad_norm: float | None
    ) -> None:
        """See `Strategy.prepare`."""
        self.scorer = scorer
        parameters: dict[str, Any] = trainable_parameters(scorer.model)
        self.parameters = parameters
        self.gradients = FlatGradients(list(parameters.values()))
        hand_over = HandOver(list(parameters.values()))
        self.engine = start_engine(
            hand_over, parameters, make_optimizer, self.config, max_grad_norm, self.device
        )

    def score(self, batch: MicroBatch) -> Tensor:
        """See `Strategy.score`."""
        scored: Tensor = self.scorer(batch)
        return scored

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Strategy.backward`."""
        del last
        self.gradients.add(loss)

    def reduce(self) -> None:
        """See `Strategy.reduce`."""
        # DeepSpeed averages over the processes.
        loss = self.engine(self.gradients.views)
        self.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def apply(self, learning_rate: float) -> float:
        """See `Strategy.apply`."""
        self.gradients.clear()
        return take_step(self.engine, learning_rate)

    def trained(self) -> dict[str, Tensor]:
        """See `Strategy.trained`."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Strategy.optimizer_state`."""
        return state_of(self.engine, self.parameters)

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Strategy.load_optimizer`."""
        # A step of zeros at a rate of zero, because DeepSpeed makes the state with the first one.
        self.gradients.clear()
        self.reduce()
        self.apply(0.0)
        load_state(self.engine, self.parameters, tensors)


class Zero3:
    """ZeRO stage 3 (arXiv 1910.02054): weights are spread as well.

    Args:
        config: for DeepSpeed; see `deepspeed_config`.
        device: its type.
    """

    name = "deepspeed-zero3"
    sharded = True
    needs_group = True

    def __init__(self, config: Mapping[str, Any], device: str) -> None:
        self.config = config
        self.device = device
        self.parameters: Mapping[str, Tensor] = {}

    def prepare(
        self, scorer: Scorer, make_optimizer: MakeOptimizer, max_grad_norm: float | None
    ) -> None:
        """See `Strategy.prepare`."""
        parameters: dict[str, Any] = trainable_parameters(scorer.model)
        self.parameters = parameters
        self.engine = start_engine(
            scorer, parameters, make_optimizer, self.config, max_grad_norm, self.device
        )

    def score(self, batch: MicroBatch) -> Tensor:
        """See `Strategy.score`."""
        scored: Tensor = self.engine(batch)
        return scored

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """See `Strategy.backward`."""
        self.engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed averages over the processes.
        self.engine.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def reduce(self) -> None:
        """The backwards have done it."""

    def apply(self, learning_rate: float) -> float:
        """See `Strategy.apply`."""
        return take_step(self.engine, learning_rate)

    def trained(self) -> dict[str, Tensor]:
        """See `Strategy.trained`."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p) for name, p in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Strategy.optimizer_state`."""
        return state_of(self.engine, self.parameters)

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Strategy.load_optimizer`."""
        # Zeros to be filled, because DeepSpeed makes the state with the first step.
        keys = {name.rsplit("|", 1)[1]: tensor for name, tensor in tensors.items()}
        for flat in self.engine.optimizer.fp32_partitioned_groups_flat:
            self.engine.optimizer.optimizer.state[flat] = {
                key: torch.zeros_like(flat) if like.numel() > 1 else like.clone()
                for key, like in keys.items()
            }
        load_state(self.engine, self.parameters, tensors)


def start_engine(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    make_optimizer: MakeOptimizer,
    config: Mapping[str, Any],
    max_grad_norm: float | None,
    device: str,
) -> Any:
    """A DeepSpeed engine around a module, in the process group that there is.

    Raises TandemError if DeepSpeed does not see the same processes, or chose another stage.
    """
    # Read when DeepSpeed is imported; it would take a CUDA device for a run on the CPU.
    os.environ["DS_ACCELERATOR"] = device
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls torch's collectives by their earlier names.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated")
    import deepspeed

    # It would compile shared-memory collectives for CPUs at the first start, for a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The run's own group, with the recipe's timeout: DeepSpeed would make one with torch's.
    deepspeed.utils.groups._WORLD_GROUP = dist.group.WORLD
    optimizer = make_optimizer(parameters.values())
    # DeepSpeed may take a step of zeros to make the state: nothing may decay in it.
    set_rate(optimizer, 0.0)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config={**config, "gradient_clipping": max_grad_norm or 0.0},
        dist_init_required=False,
    )
    asked = config["zero_optimization"]["stage"]
    obtained = (engine.zero_optimization_stage(), engine.world_size)
    if obtained != (asked, dist.get_world_size()):
        raise TandemError(
            f"DeepSpeed was asked for stage {asked} in {dist.get_world_size()} processes and "
            f"began stage {obtained[0]} in {obtained[1]}"
        )
    for state in _flat_states(engine):
        if "step" in state:  # which began with that step of zeros
            state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))
    return engine


def take_step(engine: Any, learning_rate: float) -> float:
    """Clip, apply and clear by DeepSpeed; see `Strategy.apply`."""
    set_rate(engine.optimizer, learning_rate)
    engine.step()
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def state_of(engine: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's tensors, whole, as `parameter|key`; collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    flat = _flat_states(engine)
    if not flat:
        return {}
    found = {}
    for name, parameter in parameters.items():
        for key, value in flat[0].items():
            if torch.is_tensor(value) and value.numel() > 1:
                tensor = safe_get_full_optimizer_state(parameter, key).view(_shape(parameter))
            else:
                tensor = torch.as_tensor(value).clone()
            found[f"{name}|{key}"] = tensor.detach().cpu().contiguous()
    return found


def load_state(
    engine: Any, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Put DeepSpeed's optimizer back to where any strategy's state was."""
    from deepspeed.utils import safe_set_full_optimizer_state

    for name, key, tensor in by_parameter(tensors, parameters):
        if tensor.numel() > 1:
            safe_set_full_optimizer_state(parameters[name], tensor, key)
        else:
            for state in _flat_states(engine):
                state[key] = tensor.clone()


def _shape(parameter: Any) -> torch.Size:
    # A parameter that is spread has none of its own.
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _flat_states(engine: Any) -> list[dict[str, Any]]:
    return list(engine.optimizer.optimizer.state.values())
