"""How this process was started: alone, or as one of several by torchrun or its kind."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tandem.errors import UserError


@dataclass(frozen=True)
class Launch:
    """This process among those of its run.

    Attributes:
        rank, count: its number from 0 in the whole run, and how many there are.
        local_rank, local_count: the same among the processes of this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def speaks(self) -> bool:
        """Whether it speaks for its machine, where all processes do and find the same."""
        return self.local_rank == 0


def launched() -> Launch:
    """What RANK, WORLD_SIZE and their local kin say, as torchrun, deepspeed and accelerate do it.

    Raises UserError for a number of processes, or a rank, that cannot be.
    """
    count = _number("WORLD_SIZE", 1, least=1)
    if count == 1:
        return Launch()
    launch = Launch(
        _number("RANK", 0),
        count,
        _number("LOCAL_RANK", 0),
        _number("LOCAL_WORLD_SIZE", 1, least=1),
    )
    if launch.rank >= count:
        raise UserError(
            f"RANK is {launch.rank} and WORLD_SIZE {count} in the environment; ranks count from 0"
        )
    return launch


def _number(name: str, default: int, *, least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit() or int(text) < least:
        raise UserError(f"{name} is {text!r} in the environment; it must be at least {least}")
    return int(text)
