"""What runs under the stub bridge, in a process of its own: stages, watched; prints JSON.

`python -m tests.hpu.driver FOLDER [COMMAND]...` with the stub on PYTHONPATH runs both stages lazy,
then eager, and then the commands, each in JSON: importing takes longer than all of them.
`python -m tests.hpu.driver --told MODE` ends when the bridge is imported. torch is not imported
before `prepare_devices`, as in a command.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..warm.templates import compile_once

# What a host must wait for, as operators and as functions on tensors.
SYNCS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "is_nonzero", "item", "tolist", "cpu", "numpy",
}  # fmt: skip
SETTINGS = {
    "batch_size": 5, "max_steps": 2, "learning_rate": 1e-3, "max_length": 128,
    "logging_steps": 1, "adam_epsilon": 1e-6, "lora": {"rank": 4, "alpha": 8},
}  # fmt: skip
# Lengths of the eager run, and of its token budget.
LENGTHS = (128, 256)


def run_stages(folder: Path, model: Path, **run: Any) -> None:
    """SFT, DPO and KTO on small made data, into FOLDER/sft, FOLDER/dpo and FOLDER/kto."""
    from rich.console import Console

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "said.txt").open("w") as said:
        _run(folder, model, Console(file=said, width=200), run)


def _run(folder: Path, model: Path, console: Any, run: dict[str, Any]) -> None:
    from tandem.recipe.dpo_settings import DpoSettings
    from tandem.recipe.training_settings import SftSettings
    from tandem.stages.dpo import run_dpo
    from tandem.stages.sft import run_sft

    from ..jobs import training_job
    from ..stages.made_inputs import make_conversations, make_pairs

    conversations = str(make_conversations(folder / "conversations.jsonl", 24))
    pairs = str(make_pairs(folder / "pairs.jsonl", 24))
    sft = {**SETTINGS, "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
    sft_settings = SftSettings.model_validate({"data": conversations, **sft})
    dpo_settings = DpoSettings.model_validate({"data": pairs, **SETTINGS})
    run = {"seed": 3, "dtype": "float32", **run}
    run_sft(training_job(sft_settings, model, folder / "sft", **run), console)
    run_dpo(training_job(dpo_settings, model, folder / "dpo", **run), console)
    kto_settings = DpoSettings.model_validate({"data": pairs, "loss": "kto", **SETTINGS})
    run_dpo(training_job(kto_settings, model, folder / "kto", **run), console)


class Watch:
    """Operators by region: forward, backward, and the whole of a step's micro-batches."""

    def __init__(self) -> None:
        self.region = ""
        self.loop = False
        self.pending = 0
        self.shape = 0
        self.syncs: dict[str, int] = {}
        self.streams: dict[str, set[str]] = {}
        self.inputs: set[tuple[int, ...]] = set()
        self.marks: dict[str, int] = {}
        self._ops: Any = None

    def saw(self, name: str, out: Any) -> None:
        """An operator or function, and what it gave."""
        import torch

        base = name.split(".")[0]
        if base in SYNCS:
            if self.region:
                self.syncs[self.region] = self.syncs.get(self.region, 0) + 1
            self.pending += self.loop
        if self._ops is not None:
            outs = out if isinstance(out, tuple | list) else (out,)
            shapes = [tuple(o.shape) for o in outs if isinstance(o, torch.Tensor)]
            self._ops.update(f"{name}{shapes}".encode())

    def during(self, region: str, work: Callable[[], Any]) -> Any:
        """Run work in a region, and keep the digest of its operators for the current shape."""
        # Another forward or backward of the step follows what was waited for.
        self.syncs["between"] = self.syncs.get("between", 0) + self.pending
        self.pending = 0
        self.region, self._ops = region, hashlib.sha256()
        try:
            return work()
        finally:
            self.streams.setdefault(f"{region} {self.shape}", set()).add(self._ops.hexdigest())
            self.region, self._ops = "", None


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Watch every operator, and wrap the engine's methods."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from tandem.model.logprobs.sequence_logps import Scorer
    from tandem.train.engines.engine import Engine

    class Functions(TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if f.__name__ in ("tolist", "cpu", "numpy"):  # the others dispatch an operator
                watch.saw(f.__name__, None)
            return f(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = f(*args, **(kwargs or {}))
            watch.saw(f.__name__, out)
            return out

    forward, backward, step = Scorer.forward, Engine.backward, Engine.step

    def scored(self: Any, batch: Any) -> Any:
        import torch

        watch.shape = batch.tokens
        watch.inputs.add((batch.tokens, len(batch.target_id), batch.sequences))
        if not torch.is_grad_enabled():
            return watch.during("reference", lambda: forward(self, batch))
        watch.loop = getattr(self.model, "tandem_steps", 0) > 0
        return watch.during("forward", lambda: forward(self, batch))

    def went_back(self: Any, *args: Any, **kwargs: Any) -> None:
        watch.during("backward", lambda: backward(self, *args, **kwargs))

    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch.loop, watch.pending = False, 0
        # The step-0 check of DPO may wait; from the second step on nothing has a reason to.
        self.model.tandem_steps = 1
        return step(self, *args, **kwargs)

    Scorer.forward = scored  # type: ignore[method-assign]
    Engine.backward = went_back  # type: ignore[method-assign]
    Engine.step = stepped  # type: ignore[method-assign]
    with Functions(), Operators():
        yield
    Scorer.forward, Engine.backward, Engine.step = forward, backward, step  # type: ignore[method-assign]


def prepare(mode: str) -> dict[str, Any]:
    """Tell the bridge its mode, as a command does it before torch is imported."""
    from tandem.integrations.choose import prepare_devices

    early = "torch" not in sys.modules
    notices = prepare_devices(SimpleNamespace(hpu=SimpleNamespace(lazy_mode=mode == "lazy")))
    return {"notices": notices, "early": early and "torch" not in sys.modules}


def told(mode: str) -> dict[str, Any]:
    """What the bridge was told before torch was imported."""
    prepared = prepare(mode)
    from habana_frameworks.torch import MODES  # type: ignore[import-not-found]

    return {**prepared, "modes": MODES}


def watched(folder: Path, mode: str) -> dict[str, Any]:
    """Run both stages on the stub's HPU, eager or lazy; the bridge may have been imported."""
    prepare(mode)
    from tandem.integrations.choose import choose_device
    from tandem.recipe.run_settings import HpuSettings

    lazy = mode == "lazy"
    hpu = HpuSettings(
        lazy_mode=lazy,
        buckets="max" if lazy else LENGTHS,
        fused_attention=lazy,
        fused_optimizer=lazy,
    )
    device = choose_device("auto", "auto", hpu)
    import torch
    from accelerate.utils import is_hpu_available
    from habana_frameworks.torch import core
    from habana_frameworks.torch.hpex import kernels, optimizers  # type: ignore[import-not-found]
    from transformers.utils import is_torch_hpu_available

    patched = torch.compile.__name__
    for noted in (core.marks, kernels.calls, optimizers.made):
        noted.clear()
    watch = Watch()
    with watching(watch):
        run_stages(folder / mode, folder / "model", device="hpu", hpu=hpu)
    return {
        "kind": device.kind,
        "weights": str(device.weights),
        "lazy": device.lazy,
        "found": [is_hpu_available(), is_torch_hpu_available(), patched],
        "marks": len(core.marks),
        "syncs": watch.syncs,
        "streams": {name: len(found) for name, found in watch.streams.items()},
        "inputs": sorted(watch.inputs),
        "fused": [len(kernels.calls), sorted({shape[-1] for shape in kernels.calls})],
        "optimizers": len(optimizers.made),
    }


def command(argv: list[str], variables: dict[str, str]) -> dict[str, Any]:
    """A command's exit code and what it said."""
    from accelerate.state import AcceleratorState

    from tandem.cli.main import main

    AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
    said = io.StringIO()
    before = {name: os.environ.get(name, "") for name in variables}
    os.environ.update(variables)
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(argv)
    os.environ.update(before)
    return {"code": code, "said": said.getvalue()}


def everything(folder: Path, commands: list[str]) -> dict[str, Any]:
    """All that a process can show after it has imported everything once."""
    first = told("lazy")
    compile_once()
    found = {mode: watched(folder, mode) for mode in ("lazy", "eager")}
    os.chdir(folder)
    ran = [command(**json.loads(order)) for order in commands]
    return {"told": first, **found, "commands": ran}


if __name__ == "__main__":
    os.environ.setdefault("TANDEM_KERNELS", "off")
    if sys.argv[1] == "--told":
        print(json.dumps(told(sys.argv[2])))
    else:
        print(json.dumps(everything(Path(sys.argv[1]), sys.argv[2:])))
