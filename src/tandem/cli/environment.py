"""Set what libraries read from the environment when they are imported."""

from __future__ import annotations

from typing import Any

from tandem.integrations.gaudi.bridge import bridge_installed, set_modes


def prepare_devices(run: Any) -> tuple[str, ...]:
    """Set the environment that devices read when torch is imported, as a run's settings say.

    Returns a notice where the environment was different.
    """
    notice = set_modes(lazy=run.hpu.lazy_mode) if bridge_installed() else None
    return () if notice is None else (notice,)


def has_bridge() -> bool:
    """Return whether a bridge is installed with which `auto` may find Gaudi cards."""
    return bridge_installed()
