"""Which strategy a recipe's `engine` means."""

from __future__ import annotations

from pathlib import Path

from tandem.errors import UserError
from tandem.integrations.deepspeed.ds_config import Settled, own_config, read_config
from tandem.runtime.extras import require
from tandem.train.engines.engine import Strategy
from tandem.train.engines.replicated import Replicated

_STAGES = {"deepspeed-zero2": 2, "deepspeed-zero3": 3}


def choose_strategy(
    engine: str, *, device: str, processes: int, settled: Settled | None = None
) -> Strategy:
    """The strategy of a name; `auto` is `single`, or `ddp` for several processes.

    Args:
        engine: auto, single, ddp, deepspeed-zero2, deepspeed-zero3, fsdp2, or a DeepSpeed
            configuration's path.
        device: its type.
        processes: how many there are.
        settled: what such a configuration must agree with.

    Raises UserError for a strategy that does not fit the number of processes, a package that is not
    there, and a configuration that does not agree.
    """
    if engine == "auto":
        engine = "ddp" if processes > 1 else "single"
    if engine == "single" and processes > 1:
        raise UserError(
            f"engine: single was asked for, but a launcher started {processes} processes. Start "
            "one, or use engine: auto."
        )
    if engine in ("single", "ddp"):
        return Replicated("single" if processes == 1 else "ddp", processes)
    if engine == "fsdp2":
        from tandem.train.engines.fsdp2 import Fsdp2

        return Fsdp2(device, processes)
    require("deepspeed", "deepspeed", f"engine: {engine}")
    from tandem.integrations.deepspeed.zero import Zero2, Zero3

    if engine in _STAGES:
        config = own_config(_STAGES[engine])
    else:
        assert settled is not None
        config = read_config(Path(engine), settled)
    stage = config["zero_optimization"]["stage"]
    return Zero3(config, device) if stage == 3 else Zero2(config, device)
