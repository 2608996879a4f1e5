"""`deepspeed-zero2` and `deepspeed-zero3`: DeepSpeed spreads the optimizer, or the weights too."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tandem.data.batching.collate import MicroBatch
from tandem.errors import TandemError
from tandem.model.read_model import fill_layer
from tandem.model.trained_weights import keep_rate_factors, trainable_parameters
from tandem.model.unwrap import layers_of
from tandem.train.engines.engine import Engine, MakeOptimizer
from tandem.train.engines.replicated import FlatGradients
from tandem.train.optimizers import by_parameter, set_rate

# Keys of a configuration for how many gathered weights stay for their next use.
_KEPT_GATHERED = ("stage3_max_live_parameters", "stage3_max_reuse_distance")


class _ZeroEngine(Engine):
    """What both stages do with DeepSpeed's own engine, `self.zero`."""

    needs_group = True
    pieces = "flat"
    zero: Any

    @property
    def name(self) -> str:  # type: ignore[override]
        """The recipe's name of the stage in `config`."""
        return f"deepspeed-zero{self.config['zero_optimization']['stage']}"

    def _optimizer_state(self) -> dict[str, Tensor]:
        """See `Engine._optimizer_state`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {}
        state = next(iter(_flat_states(self.zero)), {})  # all have the same keys
        for name, parameter in self.parameters.items():
            for key, value in state.items():
                if torch.is_tensor(value) and value.numel() > 1:
                    # A parameter that is sharded has no shape of its own.
                    shape = getattr(parameter, "ds_shape", parameter.shape)
                    tensor = safe_get_full_optimizer_state(parameter, key).view(shape)
                else:
                    tensor = torch.as_tensor(value).clone()
                tensors[f"{name}|{key}"] = tensor.detach().cpu().contiguous()
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.restore`: DeepSpeed keeps what it moves apart from what computes."""
        from deepspeed.utils import safe_set_full_fp32_param

        gather = _import_deepspeed(self.device.kind).zero.GatheredParameters

        for name, parameter in self.parameters.items():
            spread = self.sharded
            with gather([parameter], 0) if spread else nullcontext(), torch.no_grad():
                parameter.copy_(tensors[name])
            safe_set_full_fp32_param(parameter, tensors[name])

    def _load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore DeepSpeed's optimizer from the state that any engine saved."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for name, key, tensor in by_parameter(tensors, self.parameters):
            if tensor.numel() > 1:
                safe_set_full_optimizer_state(self.parameters[name], tensor, key)
            else:
                for state in _flat_states(self.zero):
                    state[key] = tensor.to(torch.as_tensor(state[key]).device, copy=True)

    def _start(self, module: nn.Module, make_optimizer: MakeOptimizer) -> None:
        config = {**self.config, "gradient_clipping": self.max_grad_norm or 0.0}
        optimizer = make_optimizer(self.parameters)
        self.zero = start_engine(module, optimizer, config, self.device.kind)

    def _backward_of_sum(self, loss: Tensor) -> None:
        # DeepSpeed averages over the processes.
        self.zero.backward(loss * dist.get_world_size(), scale_wrt_gas=False)

    def _apply(self, learning_rate: float) -> float:
        set_rate(self.zero.optimizer, learning_rate)
        self.zero.step()
        norm = self.zero.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)


class Zero2Engine(_ZeroEngine):
    """ZeRO stage 1 or 2 (arXiv 1910.02054): optimizer and reduced gradients are spread.

    DeepSpeed gets the trained parameters alone, and their gradients once a step: it would otherwise
    exchange them after every micro-batch, and all processes would have to run equally many. The
    model stays whole in every process, and DeepSpeed does not see it.
    """

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.load_optimizer`."""
        # A step of zeros at a rate of zero: DeepSpeed makes the state in the first step.
        self.gradients.clear()
        self._reduce()
        self._apply(0.0)
        self._link_state()
        self._load_state(tensors)

    def optimizer_state(self) -> dict[str, Tensor]:
        """See `Engine.optimizer_state`."""
        self._link_state()
        return super().optimizer_state()

    def _link_state(self) -> None:
        """Let DeepSpeed find the state of every parameter.

        It looks for all of them when the first group of parameters has taken its first step, and
        the other groups have none yet.
        """
        self.zero.optimizer._hp_optimizer_states_linked = False
        self.zero.optimizer._lazy_init_hp_params_optimizer_state()

    def _share(self, make_optimizer: MakeOptimizer) -> None:
        parameters = list(self.parameters.values())
        self.gradients = FlatGradients(parameters)
        self._start(HandOver(parameters), make_optimizer)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        del last
        self.gradients.add(loss)

    def _reduce(self) -> None:
        self._backward_of_sum(self.zero(self.gradients.views))
        self.gradients.clear()


class Zero3Engine(_ZeroEngine):
    """ZeRO stage 3 (arXiv 1910.02054): weights are spread as well."""

    sharded = True

    def _live(self) -> dict[str, Tensor]:
        """See `Engine._live`."""
        from deepspeed.utils import safe_get_full_fp32_param

        kept = {}
        for name, parameter in self.parameters.items():
            value = safe_get_full_fp32_param(parameter)
            if self.processes.is_rank0:
                kept[name] = value.cpu()
        return kept

    def _pieces(self) -> list[Tensor]:
        """See `Engine._pieces`: parts of equal length, the last one padded."""
        from deepspeed.utils import safe_get_local_fp32_param

        return [safe_get_local_fp32_param(p).detach() for p in self.parameters.values()]

    def _piece(self, parameter: Any, tensor: Tensor) -> Tensor:
        """See `Engine._piece`."""
        size, rank = parameter.ds_tensor.ds_numel, dist.get_rank()
        padding = size * dist.get_world_size() - tensor.numel()
        flat = torch.nn.functional.pad(tensor.detach().flatten(), (0, padding))
        return flat[rank * size : (rank + 1) * size].to(parameter.ds_tensor.device, copy=True)

    def _whole(self, parameter: Any, piece: Tensor) -> Tensor:
        """See `Engine._whole`."""
        pieces = [torch.empty_like(piece) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, piece.contiguous())
        return torch.cat(pieces)[: parameter.ds_numel].view(parameter.ds_shape)

    def _put(self, values: Sequence[Tensor]) -> None:
        """See `Engine._put`."""
        # Small parameters stay gathered from one step to the next.
        gathered = self.zero.optimizer.persistent_parameters
        if gathered:
            gathered[0].partition(gathered)
        for parameter, value in zip(self.parameters.values(), values, strict=True):
            parameter.ds_tensor.data.copy_(value)
        if gathered:
            gathered[0].all_gather(gathered)

    def load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """See `Engine.load_optimizer`."""
        # Zeros to be filled: DeepSpeed makes the state in the first step.
        keys = {name.rsplit("|", 1)[1]: tensor for name, tensor in tensors.items()}
        for flat in self.zero.optimizer.fp32_partitioned_groups_flat:
            self.zero.optimizer.optimizer.state[flat] = {
                # A fused optimizer counts its steps where the weights are.
                key: torch.zeros_like(flat) if like.numel() > 1 else like.to(flat.device, copy=True)
                for key, like in keys.items()
            }
        self._load_state(tensors)

    def _share(self, make_optimizer: MakeOptimizer) -> None:
        layers = layers_of(self.model)
        if layers:
            # DeepSpeed would keep up to a billion weights gathered: a whole model, if it is small.
            largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
            limits = dict.fromkeys(_KEPT_GATHERED, 2 * largest)
            zero = {**limits, **self.config["zero_optimization"]}
            self.config = {**self.config, "zero_optimization": zero}
        deepspeed = _import_deepspeed(self.device.kind)
        empty = self.parameters
        for layer in layers:
            fill_layer(self.model, layer)
            dtype = next(layer.parameters()).dtype
            deepspeed.zero.Init(layer, dtype=dtype, config_dict_or_path=dict(self.config))
        self.parameters = trainable_parameters(self.model)  # filled ones have replaced the others
        keep_rate_factors(empty, self.parameters)
        self._start(self.scorer, make_optimizer)

    def _score(self, batch: MicroBatch) -> Tensor:
        logps: Tensor = self.zero(batch)
        return logps

    def compute(self, work: Callable[[], Any]) -> Any:
        """See `Engine.compute`."""
        return self.zero(work)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self.zero.set_gradient_accumulation_boundary(last)
        self._backward_of_sum(loss)


class HandOver(nn.Module):
    """The trained parameters as a module whose backward gives them gradients that are known.

    DeepSpeed sees one forward and one backward of it a step, after all micro-batches.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        """A zero whose gradients are these, each of its parameter's shape."""
        zero: Tensor = _Known.apply(gradients, *self.trained)
        return zero


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradient * grad_outputs[0] for gradient in ctx.gradients)


def start_engine(
    module: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any], device: str
) -> Any:
    """A DeepSpeed engine around a module, in the process group that there is.

    Raises TandemError if DeepSpeed does not see the same processes, or chose another stage.
    """
    deepspeed = _import_deepspeed(device)
    # DeepSpeed may take a step of zeros to make the state: nothing may decay in it.
    set_rate(optimizer, 0.0)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=dict(config), dist_init_required=False
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


def _import_deepspeed(device: str) -> Any:
    """The package, told of the device and of the process group that there is."""
    # DeepSpeed reads this on import; it would take a CUDA device for a run on the CPU.
    os.environ["DS_ACCELERATOR"] = device
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls torch's collectives by their earlier names.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated")
    with _without("mlflow"):  # which its autotuner would import, in four times the time
        import deepspeed

    # DeepSpeed would spend a minute on compiling shared-memory collectives for CPUs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # The run's own group, with the recipe's timeout: DeepSpeed would make one with torch's.
    deepspeed.utils.groups._WORLD_GROUP = dist.group.WORLD
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
    return deepspeed


@contextmanager
def _without(package: str) -> Iterator[None]:
    """Let imports of a package fail, as if it were not installed, unless it is imported already."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


def _flat_states(engine: Any) -> list[dict[str, Any]]:
    return list(engine.optimizer.optimizer.state.values())
