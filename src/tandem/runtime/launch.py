"""How this process was started: alone, or as one of several by torchrun or another launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem import __version__
from tandem.errors import UserError

RESTART_FILE = "TANDEM_RESTART_FILE"

# Settings that `accelerate launch` puts into the environment: the value that changes nothing, and
# the recipe's key of the same meaning.
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
    """This process's rank and the number of processes, in the whole run and on this machine."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def speaks(self) -> bool:
        """Whether this process reports for its machine, where all find the same."""
        return self.local_rank == 0


def launched() -> Launch:
    """Read RANK, WORLD_SIZE and so on, as torchrun, deepspeed and accelerate set them.

    Raises UserError for an impossible number of processes or rank.
    """
    count = _number("WORLD_SIZE", 1, least=1)
    if count == 1:
        return Launch()
    # deepspeed's own launcher sets LOCAL_SIZE.
    name = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "LOCAL_SIZE"
    local_count = _number(name, 1, least=1)
    launch = Launch(_number("RANK", 0), count, _number("LOCAL_RANK", 0), local_count)
    if launch.rank >= count:
        raise UserError(
            f"RANK is {launch.rank} and WORLD_SIZE {count} in the environment; ranks count from 0"
        )
    return launch


def started_by_launcher() -> bool:
    """Return whether a launcher started this process, even if it is the only one."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """Return a command line without the `--local_rank=N` that deepspeed adds to it.

    It stands before the command, or behind a script's own words. Raises UserError if the number is
    not that in LOCAL_RANK.
    """
    rest = []
    for word in argv:
        name, equals, value = word.partition("=")
        if not equals or name.replace("_", "-") != "--local-rank":
            rest.append(word)
        elif os.environ.get("LOCAL_RANK") != value:
            raise UserError(
                f"{word} is for launchers, and LOCAL_RANK is "
                f"{os.environ.get('LOCAL_RANK', 'not set')} in the environment; leave it out"
            )
    return rest


def forget_accelerates_settings() -> list[str]:
    """Remove accelerate's settings from the environment, where they would override the recipe.

    accelerate would, for instance, divide the loss by its accumulation steps. Returns a line for
    each setting that would have had an effect. Raises UserError if `accelerate launch` was asked
    for another engine, or for several processes and started one.
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
            notices.append(f"accelerate's {name}={value} has no effect: the recipe's {key} says it")
    return notices


def announce(text: str) -> None:
    """Print the first line of a command that takes a while.

    Of several processes rank 0 prints it; those that `--nproc` started leave it to the command
    that started them.
    """
    if launched().rank == 0 and RESTART_FILE not in os.environ:
        print(f"tandem {__version__}: {text}", file=sys.stderr, flush=True)


def ask_for_restart(reason: str) -> bool:
    """Ask the launcher to restart all processes, for a reason that it shows.

    Returns whether it does: `--nproc` does, others do not. Then all must end with `Stopped`.
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
