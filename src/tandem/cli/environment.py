"""Set what libraries read from the environment when they are imported."""

from __future__ import annotations

from typing import Any

from tandem.integrations.gaudi.bridge import bridge_installed, set_modes


def prepare_devices(run: Any) -> tuple[str, ...]:
    """Set what devices read when torch is imported; call it before.

    Args:
        run: a recipe or a stage's settings, which say how the devices run.

    Returns a line for the user where the environment said something else.
    """
    notice = set_modes(lazy=run.hpu.lazy_mode) if bridge_installed() else None
    return () if notice is None else (notice,)
