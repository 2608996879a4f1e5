"""How many operations a second this machine does, where no run has said so yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tandem.plan.history import Measured, Setting, recall

# Of a product's rate, what training reaches: attention, norms and small products are slower.
_SHARE = 0.5
# Seconds that the timed products may take.
_SECONDS = 0.3
_SIZES = {"cpu": 768}
_LARGE = 4096


@dataclass(frozen=True)
class Rate:
    """Operations a second of training, of one process.

    Attributes:
        operations: a second.
        measured: the last run that is alike, if there is one.
        basis: what it is from instead of that run, in words; empty where it is from it.
    """

    operations: float
    measured: Measured | None
    basis: str = ""

    @property
    def source(self) -> str:
        """Where it is from, in words."""
        if self.basis or self.measured is None:
            return self.basis
        return f"the last {self.measured.setting.stage} run of a similar model on this machine"


def recorded_rate(setting: Setting) -> Rate | None:
    """The rate of one process in a setting from the record of runs; None where none is alike."""
    known = recall(setting)
    return None if known is None else Rate(known.rate / known.setting.processes, known)


def product_rate(device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]) -> Rate:
    """The rate that a timed matrix product lets one expect.

    Args:
        device, dtype: where and in what to time.
        synchronize: waits for the device.
    """
    basis = f"a timed matrix product, of whose rate training is taken to reach {_SHARE:.0%}"
    return Rate(_SHARE * timed_product(device, dtype, synchronize), None, basis)


def timed_product(
    device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]
) -> float:
    """Operations a second of the best of a few square products, in less than a second."""
    size = _SIZES.get(device.type, _LARGE)
    # The random state of a run must be the same whether its machine was timed or not.
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    best, began = 0.0, time.perf_counter()
    with torch.no_grad():
        for turn in range(50):
            synchronize()
            start = time.perf_counter()
            left @ left
            synchronize()
            now = time.perf_counter()
            if turn:  # the first loads the library
                best = max(best, 2 * size**3 / max(now - start, 1e-9))
            if now - began > _SECONDS and turn:
                break
    return best
