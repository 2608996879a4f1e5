"""Training stages to order, in this process or in two: one launch carries out many.

As a script under torchrun it takes a folder with `orders.json` and leaves, for each rank, how each
order ended.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.data.batching.collate import MicroBatch, Segment, collate
from tandem.data.encoded.example import Example
from tandem.errors import TandemError
from tandem.model.logprobs.sequence_logps import Scorer
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.training_settings import LoraSettings, SftSettings, ValidationSettings
from tandem.stages.dpo import run_dpo
from tandem.stages.sft import run_sft
from tandem.train import reference_logps
from tandem.train import step as micro_batches
from tandem.train.engines.engine import Engine
from tandem.train.optimizers import whole as in_one_piece
from tandem.train.trainer import Trainer
from tests.jobs import training_job

from ..stages.made_inputs import WORDS, make_model_folder
from ..warm.python import python
from .made import double_precision, without_sharing

ENGINES = ("ddp", "deepspeed-zero2", "deepspeed-zero3", "fsdp2")
KINDS = ("sft", "dpo")
DTYPES = ("float64", "float32")
# Of one step's gradients, of parameters after three AdamW steps, and of their mean drift.
LIMITS = {"float64": (1e-9, 1e-9, 1e-12), "float32": (1e-5, 5e-5, 1e-6)}
STEPS = 3  # an epoch
# Settings of adapters beside rank and alpha.
ADAPTERS: dict[str, dict[str, Any]] = {
    "": {},
    "rich": {
        "dora": True,
        "rslora": True,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"q_proj": 5},
        "plus_ratio": 3.0,
        "modules_to_save": ("norm", "embed_tokens", "lm_head"),
    },
    "pissa": {"init": "pissa", "rank_pattern": {"down_proj": 3}},
    # of the order RICH["sft"], which must be carried out before
    "started": {"from": "sft-float32-rich-whole"},
}
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Order:
    """One training stage: what is computed, and how; `trouble` is what befalls rank 1 (or 0 of 1).

    `folder` is where the result goes, below the home of all orders. Orders with the same folder
    go on with each other's work.
    """

    kind: str
    folder: str
    dtype: str = "float32"
    budget: int = 4096
    checkpointing: bool = False
    sharing: bool = True
    fault: str = ""
    trouble: str = ""
    data: str = ""
    seed: int = 1
    engine: str = "auto"
    keep: str = ""  # last or best: records are held out and scored, too
    loss: str = ""
    more: str = ""  # further settings as JSON
    adapter: str = ""  # of ADAPTERS


# Losses that need more than the log-probs of a pair: a whole step, answers to other prompts, whole
# rows, tokens one by one.
COUPLED = [
    Order(kind, f"{kind}-float64-{loss}whole", "float64", loss=loss)
    for kind, loss in (("dpo", "aot"), ("dpo", "kto"), ("dpo", "info_nca"), ("sft", "dft"))
]
BASE = [Order(kind, f"{kind}-{dtype}-whole", dtype) for kind in KINDS for dtype in DTYPES]
RICH = {
    "sft": Order("sft", "sft-float32-rich-whole", adapter="rich"),
    "dpo": Order("dpo", "dpo-float64-rich-whole", "float64", adapter="rich"),
}
PISSA = Order("sft", "sft-float32-pissa-whole", adapter="pissa")
STARTED = Order("dpo", "dpo-float32-started-whole", adapter="started")


@dataclass(frozen=True)
class Outcome:
    """How an order ended in one process: the error's class, if any, and what the console got."""

    said: str
    error: str = ""
    message: str = ""
    code: int = 0
    told: bool = False


def make_data(home: Path) -> None:
    """Records of very different lengths; the third step of an epoch has a single one."""
    rng = random.Random(4)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    with (home / "sft.jsonl").open("w") as file:
        for _ in range(13):
            turns = [
                {"from": "human", "value": words(2, 30)},
                {"from": "gpt", "value": words(1, 40)},
            ]
            file.write(json.dumps({"conversations": turns}) + "\n")
    with (home / "dpo.jsonl").open("w") as file:
        for _ in range(25):
            chosen, rejected = words(2, 30), words(1, 20)
            if rng.random() < 0.3:  # targets in the shared prefix
                rejected = chosen[:8] + rejected
            row = {"question": words(2, 30), "chosen": chosen, "rejected": rejected}
            file.write(json.dumps({"system": "", **row}) + "\n")
    with (home / "rows.jsonl").open("w") as file:
        for _ in range(25):
            scored = [{"response": words(1, 20), "overall_score": score} for score in (2, 1, 4)]
            file.write(json.dumps({"instruction": words(2, 20), "completions": scored}) + "\n")
    for kind in KINDS:
        records = (home / f"{kind}.jsonl").read_text().splitlines(keepends=True)
        (home / f"{kind}-held-out.jsonl").write_text("".join(records[:13]))
    lines = (home / "sft.jsonl").read_text().splitlines(keepends=True)
    (home / "other.jsonl").write_text("".join(lines[1:]))


def carry_out(order: Order, home: Path) -> Outcome:
    """Run a stage as ordered, through its public entry point."""
    rank = int(os.environ.get("RANK", "0"))
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1
    text = io.StringIO()
    stage: Any = run_sft if order.kind == "sft" else run_dpo
    data = order.data if order.data and rank == last else f"{order.kind}.jsonl"
    data = "rows.jsonl" if order.loss == "info_nca" else data
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / order.folder / ".." / f"{order.folder}.cache"))
        if order.dtype == "float64":
            double_precision(patch)
        # Several units of the reference pass, so that every process computes some.
        patch.setattr(reference_logps, "_UNIT", 12)
        _lay_out(patch, order)
        _record_gradients(patch, home / f"{order.folder}.rank{rank}")
        if order.trouble and rank == last:
            TROUBLES[order.trouble](patch)
        try:
            stage(
                training_job(
                    _settings(order, home / data),
                    str(home / "model"),
                    home / order.folder,
                    seed=order.seed,
                    dtype=order.dtype,
                    attention="segments",
                    tokens_per_microbatch=order.budget,
                    engine=_engine(order, home),
                ),
                Console(file=text, width=300),
            )
        except TandemError as error:
            kind = type(error).__name__
            if kind == "Stopped" and order.trouble == "SIGTERM" and rank == 0:
                copied(home, order.folder, stopped(order))
            return Outcome(text.getvalue(), kind, str(error), error.exit_code, error.reported)
    return Outcome(text.getvalue())


def torchrun(processes: int) -> list[str]:
    """The start of a command line that runs the rest of it in several processes."""
    module = [python(), "-m", "torch.distributed.run"]
    return [*module, "--standalone", "--nproc-per-node", str(processes)]


def carry_out_in(processes: int, orders: Sequence[Order], home: Path) -> list[list[Outcome]]:
    """Run orders in processes of one launch; each one's outcomes by rank."""
    (home / "orders.json").write_text(json.dumps([asdict(order) for order in orders]))
    done = subprocess.run(
        [*torchrun(processes), "-m", __name__, str(home)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[:6000]
    ranks = range(processes)
    found = [json.loads((home / f"outcomes.rank{rank}.json").read_text()) for rank in ranks]
    return [[Outcome(**outcome) for outcome in pair] for pair in zip(*found, strict=True)]


@dataclass
class Done:
    """What was carried out below `home`: the outcomes of each order, by rank."""

    home: Path
    outcomes: dict[Order, list[Outcome]] = field(default_factory=dict)

    def alone(self, orders: Iterable[Order]) -> None:
        """Carry orders out in this process."""
        self.outcomes |= {order: [carry_out(order, self.home)] for order in orders}

    def launched(self, processes: int, orders: Sequence[Order]) -> None:
        """Carry orders out in processes of one launch."""
        outcomes = carry_out_in(processes, orders, self.home)
        self.outcomes |= dict(zip(orders, outcomes, strict=True))


def started(home: Path) -> Done:
    """A model and data below `home`, and nothing done yet."""
    make_model_folder(home / "model")
    make_data(home)
    return Done(home)


def adapter(home: Path, folder: str) -> dict[str, Tensor]:
    """The trained adapter of an order."""
    path = home / folder
    if not (path / "adapter_model.safetensors").exists():  # all weights were trained
        path = path / "checkpoints" / f"step-{STEPS:06d}"
        return load_file(path / "trained.safetensors")
    return load_file(path / "adapter_model.safetensors")


def first_gradients(home: Path, folder: str, rank: int = 0) -> dict[str, Tensor]:
    """The gradients of the first step that an order took."""
    return load_file(home / f"{folder}.rank{rank}" / "gradients.safetensors")


def stopped(order: Order) -> str:
    """Where a copy of what an order had left when it was stopped is, for others to go on with."""
    return f"{order.folder}-stopped"


def copied(home: Path, folder: str, to: str) -> None:
    """What an order has left so far, for another order to go on with."""
    for part in ("", ".cache"):
        shutil.copytree(home / f"{folder}{part}", home / f"{to}{part}")


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """max over tensors of norm(a - b) / norm(b); a tensor of zeros must be met exactly."""
    assert a.keys() == b.keys()
    errors = [float((a[n] - b[n]).norm()) / max(float(b[n].norm()), 1e-30) for n in b]
    return max(errors)


def drift(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The mean of a - b over all elements, by their mean size: rounding has no direction."""
    difference = torch.cat([(a[n] - b[n]).flatten() for n in b]).mean()
    return abs(float(difference / torch.cat([b[n].flatten() for n in b]).abs().mean()))


def whole(order: Order) -> str:
    """The folder of what an order must be like: one process, everything in few micro-batches."""
    special = "".join(f"{one}-" for one in (order.adapter,) if one) + order.loss
    return f"{order.kind}-{order.dtype}-{special}whole"


def _engine(order: Order, home: Path) -> str:
    """An engine's name, or where its file is."""
    return str(home / order.engine) if order.engine.endswith(".json") else order.engine


def _held_out(order: Order, data: Path) -> dict[str, Any]:
    source = DataSource(path=str(data.with_name(f"{order.kind}-held-out.jsonl")))
    return {"keep": order.keep, "validation": ValidationSettings(data=(source,), steps=2)}


def _settings(order: Order, data: Path) -> SftSettings | DpoSettings:
    ranked = "ranked" if order.loss == "info_nca" else None
    values: dict[str, Any] = {
        "data": (DataSource(path=str(data), completions=ranked),),
        **({"loss": order.loss} if order.loss else {}),
        **(_held_out(order, data) if order.keep else {}),
        "batch_size": 6 if order.kind == "sft" else 12,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "max_length": 200,
        "logging_steps": 1,
        "save_steps": STEPS,
        **_trained(order, data.parent),
        "gradient_checkpointing": order.checkpointing,
        **json.loads(order.more or "{}"),
    }
    return SftSettings(**values) if order.kind == "sft" else DpoSettings(**values)


def _trained(order: Order, home: Path) -> dict[str, Any]:
    """An adapter; or all weights, of whose gradients some are as small as their rounding."""
    if order.adapter == "full":
        return {"full": True, "adam_epsilon": 1e-4}
    return {"lora": _lora(order, home)}


def _lora(order: Order, home: Path) -> LoraSettings:
    more: dict[str, Any] = {"dropout": 0.1 if order.kind == "sft" else 0.0}
    more |= ADAPTERS[order.adapter]
    if "from" in more:
        return LoraSettings(**{**more, "from": str(home / more["from"])})
    return LoraSettings(**{"rank": 4, "alpha": 8, "target_modules": _adapted(order)} | more)


def _adapted(order: Order) -> tuple[str, ...] | str:
    """In float32 two kinds of layers, for what engines do with a tensor they do with each."""
    if order.trouble == "no such module":
        return ("wq",)
    return "all-linear" if order.dtype == "float64" else ("q_proj", "down_proj")


def _lay_out(patch: pytest.MonkeyPatch, order: Order) -> None:
    """Lay out micro-batches without sharing, or with a seeded fault, in training and reference."""

    def laid_out(trees: Sequence[Example], keys: Sequence[int] | None = None) -> MicroBatch:
        fed = trees if order.sharing else [part for tree in trees for part in without_sharing(tree)]
        batch = collate(fed, keys)
        return FAULTS[order.fault](batch) if order.fault else batch

    patch.setattr(micro_batches, "collate", laid_out)
    patch.setattr(reference_logps, "collate", laid_out)


def _record_gradients(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def step(self: Engine, rate: float) -> float:
        self._reduce()
        if not (folder / "gradients.safetensors").exists():
            folder.mkdir(exist_ok=True)
            save_file(whole_gradients(self), folder / "gradients.safetensors")
        norm = self._apply(rate)
        self._follow()
        with (folder / "norms.txt").open("a") as file:
            file.write(f"{norm!r}\n")
        return norm

    patch.setattr(Engine, "step", step)


def whole_gradients(engine: Any) -> dict[str, Tensor]:
    """A step's gradients, summed over processes and whole, before they are applied."""
    if engine.name in ("single", "ddp"):
        return {
            n: g.clone() for n, g in zip(engine.parameters, engine.gradients.views, strict=True)
        }
    if engine.name == "fsdp2":
        return {n: in_one_piece(p.grad).clone() for n, p in engine.parameters.items()}
    from deepspeed.utils import safe_get_full_grad

    return {n: safe_get_full_grad(p).clone() for n, p in engine.parameters.items()}


def leak_to_the_neighbour(batch: MicroBatch) -> MicroBatch:
    """A branch also sees its neighbour's first row, and a record the one before it."""
    segments: list[Segment] = []
    for s in batch.segments:
        if s.prefix_stop > s.prefix_start:
            segments.append(replace(s, prefix_stop=s.prefix_stop + 1))
        elif segments and segments[-1].prefix_stop == segments[-1].prefix_start:
            segments[-1] = Segment(segments[-1].start, s.stop)
        else:
            segments.append(s)
    return replace(batch, segments=tuple(segments))


def running_positions(batch: MicroBatch) -> MicroBatch:
    """Positions that run on over branches instead of starting anew."""
    return replace(batch, position_ids=torch.arange(batch.tokens))


def forgotten_prefix(batch: MicroBatch) -> MicroBatch:
    """Second branches that do not see their prompt."""
    segments = tuple(Segment(s.start, s.stop) for s in batch.segments)
    return replace(batch, segments=segments)


FAULTS: dict[str, Callable[[MicroBatch], MicroBatch]] = {
    function.__name__: function
    for function in (leak_to_the_neighbour, running_positions, forgotten_prefix)
}


def _after_a_step(patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    plain = Trainer._take

    def take(self: Any, step: Any) -> Any:
        report = plain(self, step)
        if step.number == 0:
            act()
        return report

    patch.setattr(Trainer, "_take", take)


def _stop(patch: pytest.MonkeyPatch) -> None:
    _after_a_step(patch, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _not_a_number(patch: pytest.MonkeyPatch) -> None:
    plain, calls = Engine.score, 0

    def score(self: Engine, batch: MicroBatch) -> Tensor:
        nonlocal calls
        calls += 1
        return plain(self, batch) * (float("nan") if calls == 2 else 1.0)

    patch.setattr(Engine, "score", score)


def _bug(patch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    patch.setattr("tandem.stages.training.model_setup.choose_backend", crash)


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logps: Tensor) -> Tensor:
        return logps.view_as(logps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def _out_of_memory(*calls: int, where: str = "forward") -> Callable[[pytest.MonkeyPatch], None]:
    """The calls of the model that fail, counted over training, or over the reference pass."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        plain, count = Scorer.forward, itertools.count(1)

        def forward(self: Scorer, batch: MicroBatch) -> Tensor:
            if torch.is_grad_enabled() == (where == "reference") or next(count) not in calls:
                return plain(self, batch)
            if where == "backward":
                failing: Tensor = _Fails.apply(plain(self, batch))
                return failing
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

        patch.setattr(Scorer, "forward", forward)

    return inject


TROUBLES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "SIGTERM": _stop,
    "not finite": _not_a_number,
    "bug": _bug,
    "no such module": lambda _: None,
    "no memory at first": _out_of_memory(1),
    "no memory in between": _out_of_memory(2, 3),
    "no memory backward": _out_of_memory(1, 3, 6, where="backward"),
    "no memory for long": _out_of_memory(*range(2, 5), where="backward"),
    "no memory for ever": _out_of_memory(*range(1, 1000)),
    "no memory in the reference": _out_of_memory(1, 2, where="reference"),
}


def _main(home: Path) -> None:
    rank = os.environ["RANK"]
    orders = [Order(**values) for values in json.loads((home / "orders.json").read_text())]
    outcomes = []
    for order in orders:
        try:
            outcomes.append(carry_out(order, home))
        except ZeroDivisionError as error:
            outcomes.append(Outcome("", "ZeroDivisionError", str(error), 1))
    text = json.dumps([asdict(outcome) for outcome in outcomes])
    (home / f"outcomes.rank{rank}.json").write_text(text)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
