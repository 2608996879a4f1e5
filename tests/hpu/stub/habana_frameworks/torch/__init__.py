"""On import, as the bridge does it: torch gets an `hpu` device.

What is asked of it lands on the CPU: a mode replaces the device in every call, for this thread
and for as long as the process lives.
"""

from __future__ import annotations

import os
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What the bridge found when it was imported.
MODES = {name: os.environ.get(name) for name in ("PT_HPU_LAZY_MODE", "PT_ENABLE_INT64_SUPPORT")}


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "hpu":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "hpu" else value


class _Redirect(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.device:  # naming the device is no request to it
            return function(*args, **(kwargs or {}))
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(_on_cpu, args), **kwargs)


_hpu: Any = types.ModuleType("torch.hpu")
_hpu.is_available = lambda: os.environ.get("STUB_CARDS", "1") != "0"
_hpu.device_count = lambda: int(os.environ.get("STUB_CARDS", "1"))
_hpu.current_device = lambda: 0
_hpu.synchronize = lambda *_: None
_hpu.mem_get_info = lambda *_: (8 * 2**30, 96 * 2**30)
_hpu.max_memory_allocated = lambda *_: 2**30
_hpu.get_rng_state = torch.get_rng_state
_hpu.set_rng_state = torch.set_rng_state
_hpu.is_bf16_supported = lambda: True
torch.hpu = _hpu

_Redirect().__enter__()
