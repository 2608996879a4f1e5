"""Norms and gated MLPs whose elementwise part takes one pass over memory instead of five.

On CPU by the C kernels, or on any device by torch.compile. Modules stay in place under their names;
only their forward is replaced, after one of the same class and width gave on random rows what the
function gives: names and attributes alone would take Gemma's norm, which multiplies by 1 + weight,
for Llama's. All layers share one compiled function for each kind of norm and gate.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.errors import UserError
from tandem.model.cpu.c_kernels import RmsNorm, SwiGlu, kernels, usable
from tandem.model.cpu.stored_weights import is_stored
from tandem.model.read_model import weights_of_module

_PROBE_ROWS = 3
# Relative difference from the module's own forward that rounding in a dtype explains.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}
_PARTS = ("gate_proj", "up_proj", "down_proj")


def fuse_elementwise(model: nn.Module) -> None:
    """Send RMS norms and SiLU-gated MLPs through the C kernels, where device and dtype fit them."""
    agreed: dict[tuple[type, int], bool] = {}
    for module in model.modules():
        fused = _kernel_forward(module)
        if fused is None or "forward" in module.__dict__:
            continue
        # The kernels take some widths only.
        kind = type(module), _weight(module).shape[-1]
        if kind not in agreed:
            with weights_of_module(model, module):
                agreed[kind] = _agree(module, fused, stored=is_stored(model))
        if agreed[kind]:
            module.forward = fused


def _kernel_forward(module: nn.Module) -> Any:
    if _is_norm(module):
        return partial(_kernel_norm, module, module.forward)
    silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    if silu and all(isinstance(getattr(module, name, None), nn.Linear) for name in _PARTS):
        return partial(_kernel_mlp, module, module.forward)
    return None


def _kernel_norm(module: Any, plain: Any, hidden: Tensor) -> Tensor:
    weight, library = module.weight, kernels()
    if weight.requires_grad or not usable(library, hidden, weight):
        return plain(hidden)
    return RmsNorm.apply(library, hidden, weight, _epsilon(module))


def _kernel_mlp(module: Any, plain: Any, hidden: Tensor) -> Tensor:
    library = kernels()
    if not usable(library, hidden):
        return plain(hidden)
    gated = SwiGlu.apply(library, module.gate_proj(hidden), module.up_proj(hidden))
    return module.down_proj(gated)


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and _epsilon(module) is not None


def _epsilon(module: nn.Module) -> float | None:
    """The epsilon of a norm with a weight; None for other modules."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return epsilon if isinstance(epsilon, float) and hasattr(module, "weight") else None


def _weight(module: Any) -> Tensor:
    return module.weight if hasattr(module, "weight") else module.gate_proj.weight


def _probe_rows(width: int) -> Tensor:
    """Random rows [1, 3, width], made on the CPU for the same numbers everywhere."""
    return torch.randn(1, _PROBE_ROWS, width, generator=torch.Generator().manual_seed(0))


def _agree(module: nn.Module, fused: Any, *, stored: bool) -> bool:
    """Whether the kernel takes a few random rows, and gives what the module gives."""
    weight = _weight(module)
    rows = _probe_rows(weight.shape[-1])
    # A gated MLP's weights do not reach the kernel.
    if not usable(kernels(), rows, rows if stored and not _is_norm(module) else weight):
        return False
    trained = weight.requires_grad
    weight.requires_grad_(False)
    with torch.no_grad():
        wanted, ours = module(rows), fused(rows)
    weight.requires_grad_(trained)
    tolerance = _TOLERANCE[torch.float32]
    return bool(torch.allclose(ours, wanted, rtol=tolerance, atol=tolerance))


def check_compile(wanted: bool, *, device: str, sharded: bool) -> None:
    """Raise UserError where compiling is not supported, before anything is read."""
    if wanted and device not in ("cpu", "cuda"):
        raise UserError(
            f"compile: not supported on {device}, only on cuda and cpu; set it to false"
        )
    if wanted and sharded:
        raise UserError(
            "compile: not supported under an engine that shards the base, whose norms have no "
            "weights between their layers' turns; use engine: ddp or deepspeed-zero2, or set it "
            "to false"
        )


def settle_compile_caches(log: Callable[[str], None]) -> None:
    """Replace a compiler's cache that cannot be written, which would end the run, and log it."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        folder = os.environ.get(name)
        if not folder:
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            log(f"{name} cannot be used ({error}): what is compiled is not kept for other runs")
            os.environ[name] = tempfile.mkdtemp(prefix="tandem-compiled-")
            atexit.register(shutil.rmtree, os.environ[name], ignore_errors=True)


def compile_elementwise(model: nn.Module) -> int:
    """Send RMS norms and gated MLPs through compiled functions, not through the C kernels.

    Returns how many modules. Raises UserError for a model without any such module.
    """
    compiled: dict[Any, Any] = {}
    count = 0
    for module in model.modules():
        chosen = _choose(module)
        if chosen is None:
            continue
        take, function = chosen
        if function not in compiled:
            with _quiet():
                compiled[function] = torch.compile(function)
        module.forward = partial(take, module, compiled[function], function)
        count += 1
    if not count:
        raise UserError(
            f"compile: {type(model).__name__} has no norms or gated MLPs that tandem compiles; set "
            "it to false"
        )
    return count


class Compiling:
    """What a run compiles: seconds, and how many graphs."""

    def __init__(self) -> None:
        self._before = _graphs()
        self.seconds = 0.0

    def graphs(self) -> int:
        """Graphs that were compiled since this was made."""
        return _graphs() - self._before

    def warm_up(
        self, model: nn.Module, score: Callable[[Any], Tensor], batches: Sequence[Any]
    ) -> None:
        """Compile all that a run needs, by scoring micro-batches with and without gradients.

        Two of several rows each suffice. Raises UserError where no compiler works on this device.
        """
        from torch._dynamo.exc import TorchDynamoException

        began = time.perf_counter()
        training = model.training
        try:
            with _quiet():
                model.train()
                for batch in batches:
                    score(batch).sum().backward()
                model.eval()
                with torch.no_grad():
                    score(batches[0])
        except TorchDynamoException as error:
            said = " ".join(str(error).strip().splitlines()[:2])
            raise UserError(
                f"compile: torch.compile fails here ({said}); install a C++ compiler (for CPUs) or "
                "Triton (for CUDA), or set it to false"
            ) from None
        finally:
            model.train(training)
            model.zero_grad(set_to_none=True)
        self.seconds = time.perf_counter() - began


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the compiler's warnings about itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.*is deprecated")
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not")
        yield


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _choose(module: nn.Module) -> Any:
    """How to take a module, and the function that is its elementwise part; None for others."""
    anything: Any = module
    if _is_norm(module):
        width, take = anything.weight.shape[-1], _compiled_norm
        functions: tuple[Any, ...] = (_rms, _rms_cast_last, _rms_from_one)
    elif all(isinstance(getattr(module, name, None), nn.Module) for name in _PARTS):
        width, take = anything.gate_proj.in_features, _compiled_mlp
        functions = (_silu_gate, _gelu_gate)
    else:
        return None
    weight = next(module.parameters())
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    # Random rows, because a norm's weights of 1 would hide the difference.
    rows = _probe_rows(width).to(weight.device, dtype)
    with torch.no_grad():
        wanted = module(rows).float()
        off = {f: float((take(module, f, f, rows) - wanted).abs().max()) for f in functions}
    best = min(functions, key=lambda function: off[function])
    return (take, best) if off[best] <= _TOLERANCE[dtype] * float(wanted.abs().max()) else None


def _compiled_norm(module: Any, compiled: Any, plain: Any, hidden: Tensor) -> Tensor:
    rows = hidden.reshape(-1, hidden.shape[-1])
    normed: Tensor = _by_rows(compiled, plain, rows)(rows, module.weight, _epsilon(module))
    return normed.view(hidden.shape)


def _compiled_mlp(module: Any, compiled: Any, plain: Any, hidden: Tensor) -> Tensor:
    gate, up = module.gate_proj(hidden), module.up_proj(hidden)
    rows = gate.reshape(-1, gate.shape[-1])
    gated = _by_rows(compiled, plain, rows)(rows, _marked(up.reshape(rows.shape)))
    return module.down_proj(gated.view(gate.shape))


def _by_rows(compiled: Any, plain: Any, rows: Tensor) -> Any:
    """The function for rows [T, C]; one row alone would be compiled for one row."""
    if rows.shape[0] < 2:
        return plain
    _marked(rows)
    return compiled


def _marked(rows: Tensor) -> Tensor:
    """Rows whose number torch.compile takes for one that changes."""
    torch._dynamo.maybe_mark_dynamic(rows, 0)
    return rows


def _rms(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * _normalised(rows, epsilon).to(rows.dtype)


def _rms_cast_last(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return (weight * _normalised(rows, epsilon)).to(rows.dtype)


def _rms_from_one(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return (_normalised(rows, epsilon) * (1.0 + weight.float())).to(rows.dtype)


def _normalised(rows: Tensor, epsilon: float) -> Tensor:
    wide = rows.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)


def _silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gelu_gate(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up
