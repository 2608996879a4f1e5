"""Which device and which engine a recipe means: the only list of all kinds there are."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.errors import UserError, require
from tandem.integrations.gaudi import bridge
from tandem.recipe.run_settings import HpuSettings, RunSettings

if TYPE_CHECKING:
    from tandem.recipe.training_settings import TrainingSettings
    from tandem.runtime.device import Device
    from tandem.runtime.process_group import ProcessGroup
    from tandem.train.engines.engine import Engine
    from tandem.train.optimizers import Pieces

# `auto` takes the first of these that is available.
_AUTO = ("hpu", "cuda", "xpu", "mps", "cpu")
# Without AMX, bfloat16 products are slower than float32 ones on CPUs.
_HALF_BY_DEFAULT = ("hpu", "cuda", "xpu")
# Files in /dev of the drivers of NVIDIA's cards and Tegra chips, of AMD's and Intel's cards, and of
# cards seen from within WSL.
_DRIVERS = ("nvidiactl", "nvmap", "kfd", "dri", "dxg")
_ZERO = {"deepspeed-zero2": 2, "deepspeed-zero3": 3}


def choose_device(device: str, dtype: str, hpu: HpuSettings | None = None) -> Device:
    """Resolve the recipe's device and dtype (float64 for tests), `auto` or explicit.

    `hpu` None takes the mode that Gaudi cards are set to, and none of Habana's kernels.

    Raises UserError with the reason for a device this machine lacks, for a dtype that it lacks,
    and for more processes than it has.
    """
    import torch

    from tandem.runtime.device import DTYPES, Device, numbered

    kind = device
    if device == "auto":
        kind = next(k for k in _AUTO if _unavailable_reason(k, hpu) is None)
    elif reason := _unavailable_reason(device, hpu):
        raise UserError(f"device: {device} was asked for, but {reason}. Use device: auto or cpu.")
    dtype = _default_dtype(kind) if dtype == "auto" else dtype
    # transformers imports an installed DeepSpeed, which would look for a device itself.
    os.environ.setdefault("DS_ACCELERATOR", kind)
    if kind == "hpu":
        from tandem.integrations.gaudi.gaudi_device import open_gaudi

        chosen: Device = open_gaudi(DTYPES[dtype], hpu or HpuSettings())
    else:
        chosen = Device(torch.device(numbered(kind)), DTYPES[dtype])
    if chosen.weights == torch.float64 and chosen.sums != torch.float64:
        raise UserError(f"dtype: float64 does not exist on {kind}; use device: cpu")
    return chosen


def device_of(run: RunSettings) -> Device:
    """The device that a run's settings ask for; see `choose_device`."""
    return choose_device(run.device, run.dtype, run.hpu)


def prepare_devices(run: RunSettings) -> tuple[str, ...]:
    """Set what devices read in the environment when torch is imported; call it before.

    Returns a line for the user where the environment said something else.
    """
    installed = bridge.bridge_installed()
    notice = bridge.set_modes(lazy=run.hpu.lazy_mode) if installed else None
    return () if notice is None else (notice,)


def has_bridge() -> bool:
    """Whether a bridge is installed through which `auto` may find Gaudi cards."""
    return bridge.bridge_installed()


@dataclass(frozen=True)
class DeviceNames:
    """The kind of a device and the dtype of the weights on it, as `Device` calls them."""

    kind: str
    dtype_name: str


def device_names(run: RunSettings) -> DeviceNames:
    """The names of the device that a run's settings ask for; torch is imported only to find one.

    Raises UserError as `choose_device` does.
    """
    unknown = "torch" in sys.modules or bridge.bridge_installed()
    if not unknown and (run.device == "cpu" or (run.device == "auto" and _only_a_cpu())):
        return DeviceNames("cpu", _default_dtype("cpu") if run.dtype == "auto" else run.dtype)
    device = device_of(run)
    return DeviceNames(device.kind, device.dtype_name)


def _default_dtype(kind: str) -> str:
    return "bfloat16" if kind in _HALF_BY_DEFAULT else "float32"


def _only_a_cpu() -> bool:
    """Whether it is certain that torch would find no other device here."""
    if sys.platform != "linux":
        return False
    return metadata.version("torch").endswith("+cpu") or not any(
        Path("/dev", name).exists() for name in _DRIVERS
    )


def idle_settings(
    run: RunSettings, device: Device | DeviceNames, optimizer: str = "adamw"
) -> list[str]:
    """A line on each of a run's settings that has no effect on this device, for this optimizer."""
    if device.kind == "hpu" and run.hpu.fused_optimizer and optimizer != "adamw":
        return [f"hpu.fused_optimizer does nothing for optimizer: {optimizer}"]
    if device.kind == "hpu" or run.hpu == type(run.hpu)():
        return []
    return [f"the recipe's hpu section does nothing on {device.kind}"]


def _unavailable_reason(kind: str, hpu: HpuSettings | None) -> str | None:
    """What keeps a kind of device from being used here, None if nothing does."""
    import torch

    from tandem.runtime.device import unavailable_reason

    if kind != "hpu":
        return unavailable_reason(kind)
    if not bridge.bridge_installed():
        return "Habana's bridge (habana_frameworks) is not installed; its containers have it"
    bridge.load_bridge(lazy=None if hpu is None else hpu.lazy_mode)
    there = hasattr(torch, "hpu") and torch.hpu.is_available()
    return None if there else "the bridge sees no Gaudi card here"


def pieces_of(engine: str) -> Pieces:
    """What the optimizer of a recipe's engine holds of each parameter, without loading it."""
    if engine == "fsdp2":
        return "shards"
    return "whole" if engine in ("auto", "single", "ddp") else "flat"


def choose_engine(
    engine: str, device: Device, processes: ProcessGroup, settings: TrainingSettings | None = None
) -> Engine:
    """The engine of a name, which holds no model yet; `auto`: `single`, or `ddp` for several.

    `engine` may be the path of a DeepSpeed configuration, which must agree with `settings`.

    Raises UserError for an engine that does not fit the number of processes, a package that is not
    there, and a configuration that does not agree.
    """
    if engine == "single" and processes.count > 1:
        raise UserError(
            f"engine: single was asked for, but a launcher started {processes.count} processes. "
            "Start one, or use engine: auto."
        )
    if engine in ("auto", "single", "ddp"):
        from tandem.train.engines.replicated import ReplicatedEngine

        return ReplicatedEngine(device, processes)
    if engine == "fsdp2":
        from tandem.train.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(device, processes)
    require("deepspeed", "deepspeed", f"engine: {engine}")
    from tandem.integrations.deepspeed.ds_config import own_config, read_config
    from tandem.integrations.deepspeed.zero import Zero2Engine, Zero3Engine

    config: Mapping[str, Any]
    if engine in _ZERO:
        config = own_config(_ZERO[engine])
    else:
        assert settings is not None
        config = read_config(Path(engine), settings, device.dtype_name, processes.count)
    kind = Zero3Engine if config["zero_optimization"]["stage"] == 3 else Zero2Engine
    return kind(device, processes, config)
