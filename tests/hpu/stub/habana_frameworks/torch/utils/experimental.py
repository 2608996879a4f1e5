"""Which generation of card it is."""

from __future__ import annotations

from enum import Enum

synDeviceType = Enum("synDeviceType", ["synDeviceGaudi", "synDeviceGaudi2"])  # noqa: N816 (the bridge's own name)


def _get_device_type() -> synDeviceType:
    return synDeviceType["synDeviceGaudi2"]
