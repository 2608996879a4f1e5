"""Gaudi cards: the one place that imports Habana's bridge. This module itself needs no torch."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tandem.errors import UserError
from tandem.runtime.launch import launched

_MODE = "PT_HPU_LAZY_MODE"


def bridge_installed() -> bool:
    """Whether Habana's bridge to torch is installed, as it is in Habana's containers."""
    return find_spec("habana_frameworks") is not None


def set_modes(*, lazy: bool) -> str | None:
    """Set the variables that the bridge reads when torch is imported.

    Libraries take an unset mode for lazy, and the bridge takes it for eager, so it is always set.
    Returns a line about an environment that said otherwise, or None.
    """
    before = os.environ.get(_MODE)
    os.environ[_MODE] = "1" if lazy else "0"
    # Row keys and token ids are int64; the bridge narrows them to int32 otherwise.
    os.environ["PT_ENABLE_INT64_SUPPORT"] = "1"
    if before is None or before == os.environ[_MODE]:
        return None
    return (
        f"{_MODE}={before} of the environment gives way to hpu.lazy_mode: {str(lazy).lower()} "
        "(--use_lazy_mode)"
    )


def load_bridge(*, lazy: bool | None) -> None:
    """Import the bridge, so that torch has an `hpu` device; `lazy` None takes the mode that is set.

    transformers, when it finds the bridge, replaces torch.gather, torch.scatter, torch.compile
    and others by versions that avoid faults on Gaudi, for the whole process. It looks here, so
    that this happens before anything is computed and not in the middle of a run.

    Raises UserError where the bridge runs in another mode already.
    """
    mode = None if lazy is None else "1" if lazy else "0"
    if "habana_frameworks.torch" not in sys.modules:
        set_modes(lazy=lazy_mode() if lazy is None else lazy)
    elif mode is not None and mode != ("1" if lazy_mode() else "0"):
        raise UserError(
            f"hpu.lazy_mode asks for {_MODE}={mode}, but torch was imported with "
            f"{_MODE}={os.environ.get(_MODE, '(unset)')}. Set it before Python starts."
        )
    import_module("habana_frameworks.torch")
    import_module("habana_frameworks.torch.core")
    if launched().count > 1:  # gives each process its card
        import_module("habana_frameworks.torch.distributed.hccl")
    from transformers.utils import is_torch_hpu_available

    is_torch_hpu_available()


def lazy_mode() -> bool:
    """Whether the bridge is set to lazy mode."""
    return os.environ.get(_MODE) == "1"


def mark_step() -> None:
    """Launch the graph gathered so far; lazy mode computes nothing before."""
    sys.modules["habana_frameworks.torch.core"].mark_step()


def fused_adamw() -> Any:
    """Habana's AdamW in one kernel, a class. Raises UserError where it cannot be imported."""
    home = "habana_frameworks.torch.hpex.optimizers"
    try:
        return import_module(home).FusedAdamW
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"hpu.fused_optimizer needs FusedAdamW of {home}, which cannot be imported ({error}). "
            "Set it to false."
        ) from None
