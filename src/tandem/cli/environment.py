"""What libraries read from the environment when they are imported, set before they are."""

from __future__ import annotations

from tandem.integrations.gaudi.bridge import bridge_installed, set_modes


def prepare_gaudi(*, lazy: bool) -> tuple[str, ...]:
    """Set the mode of Gaudi cards where there may be some; call it before torch is imported.

    Returns a line for the user about what the environment said otherwise, if it did.
    """
    notice = set_modes(lazy=lazy) if bridge_installed() else None
    return () if notice is None else (notice,)
