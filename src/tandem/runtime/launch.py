"""How this process was started: alone, or as one of several by torchrun or its kind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import UserError

RESTART_FILE = "TANDEM_RESTART_FILE"

# What `accelerate launch` hands on of its own settings, and which value asks for nothing.
_ACCELERATE = {
    "ACCELERATE_MIXED_PRECISION": ("no", "dtype"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "batch_size"),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "max_grad_norm"),
    "ACCELERATE_USE_CPU": ("false", "device"),
}
_ACCELERATE_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "deepspeed-zero2",
    "ACCELERATE_USE_FSDP": "fsdp2",
    "ACCELERATE_USE_MEGATRON_LM": "ddp",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "fsdp2",
}


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
    # deepspeed's own launcher says LOCAL_SIZE.
    local_count = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    launch = Launch(
        _number("RANK", 0),
        count,
        _number("LOCAL_RANK", 0),
        _number(local_count, 1, least=1),
    )
    if launch.rank >= count:
        raise UserError(
            f"RANK is {launch.rank} and WORLD_SIZE {count} in the environment; ranks count from 0"
        )
    return launch


def started_by_launcher() -> bool:
    """Whether a launcher started this process, even if it is the only one."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """A command line without the `--local_rank=N` that launchers put before the command.

    deepspeed does so unless it is told `--no_local_rank`; the number is in LOCAL_RANK, too.

    Raises UserError for another number than that one.
    """
    if not argv:
        return []
    name, equals, value = argv[0].partition("=")
    if not equals or name.replace("_", "-") != "--local-rank":
        return list(argv)
    if os.environ.get("LOCAL_RANK") != value:
        raise UserError(
            f"{argv[0]} is for launchers, and LOCAL_RANK is "
            f"{os.environ.get('LOCAL_RANK', 'not set')} in the environment; leave it out"
        )
    return list(argv[1:])


def forget_accelerates_settings() -> list[str]:
    """Take accelerate's own settings out of the environment: a recipe says these things.

    accelerate heeds them behind the recipe's back, for instance by dividing the loss by its
    accumulation steps.

    Returns:
        A line for each setting that asked for something.

    Raises UserError where `accelerate launch` was asked for another engine, or for several
    processes and started one.
    """
    if "ACCELERATE_DYNAMO_BACKEND" not in os.environ:  # which accelerate launch always sets
        return []
    for name, engine in _ACCELERATE_ENGINES.items():
        if os.environ.get(name, "false").lower() == "true":
            raise UserError(
                f"accelerate launch was told to choose the engine ({name}), which is the recipe's "
                f"to say: set engine: {engine} (--engine {engine}) and start the processes with "
                "accelerate launch --multi_gpu, without a config file that names an engine"
            )
    if "MASTER_PORT" in os.environ and not started_by_launcher():
        raise UserError(
            "accelerate launch was asked for several processes and started one, as it does on "
            "CPUs. Use accelerate launch --multi_gpu, which works on CPUs too, torchrun, or --nproc"
        )
    notices = []
    for name, (nothing, key) in _ACCELERATE.items():
        value = os.environ.pop(name, nothing)
        if value.lower() != nothing:
            notices.append(f"accelerate's {name}={value} is not heeded: the recipe's {key} is")
    return notices


def ask_for_restart(reason: str) -> bool:
    """Leave word that all processes should be started again, for whoever started them.

    The processes then have to end with `Stopped`.

    Args:
        reason: a short line, which is shown.

    Returns:
        Whether there is somebody who would start them again: `--nproc` does.
    """
    path = os.environ.get(RESTART_FILE)
    if path is None:
        return False
    Path(path).write_text(reason)
    return True


def _number(name: str, default: int, *, least: int = 0) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit() or int(text) < least:
        raise UserError(f"{name} is {text!r} in the environment; it must be at least {least}")
    return int(text)
