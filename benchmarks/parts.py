"""What each part of the engine gives on CPU: `python -m benchmarks.parts`.

One process takes the same DPO step (forward and backward of all its micro-batches) and reference
pass with one part at a time in its plainer form, and under other token budgets, all in turn. The
tables give medians, and how much longer than as shipped each takes: the median of the ratios within
a turn. All must find the same log-probs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tandem.data.batching.collate import MicroBatch, collate
from tandem.data.encoded.example import Example
from tandem.model import elementwise
from tandem.model.attention import segments
from tandem.model.cpu import onednn_linear
from tandem.model.load_model import load_model
from tandem.model.logprobs import output_head
from tandem.model.logprobs.sequence_logps import micro_batches, sequence_logps
from tandem.model.lora import adapted
from tandem.model.lora.adapter import LoraWeights
from tandem.model.prepare_model import FOR_TRAINING, Preparation, prepare_model
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import LoraSettings

from .record import Environment, log
from .tables import RESULTS
from .training import SHARED
from .work import ADAPTERS, SEED, read_trees, write_first_lines, write_model

Patches = Sequence[tuple[Any, str, Any]]


def _none() -> None:
    return None


def _gathered(query: Tensor, key: Tensor, value: Tensor, rows: Any, scale: float | None) -> Tensor:
    return segments._gathered(query, key, value, SimpleNamespace(segments=rows), scale, None)  # type: ignore[arg-type]


_TORCH_ATTENTION: Patches = ((segments, "kernels", _none),)
_AS_STORED: Patches = (
    (onednn_linear, "weights_of", lambda layer: onednn_linear.Plain(layer.weight)),
    (output_head.Head, "blocks", lambda self, columns, dtype: _plain_blocks(self, columns, dtype)),
)
# Each form replaces some names of the engine; nothing of it is reachable from a recipe.
FORMS: dict[str, Patches] = {
    "as shipped": (),
    "attention: two flash calls of torch, merged by log-sum-exp": _TORCH_ATTENTION,
    "attention: gathered keys and values, torch": (
        *_TORCH_ATTENTION,
        (segments, "_FlashSegments", SimpleNamespace(apply=_gathered)),
    ),
    "norms and gated MLPs: torch": ((elementwise, "kernels", _none),),
    "head: torch's softmax": ((output_head, "kernels", _none),),
    "adapter: peft's arithmetic": ((adapted, "takes_frozen", lambda *_: False),),
    "frozen weights: as stored": _AS_STORED,
    "frozen weights: as stored; head: 256 rows by the whole vocabulary": (
        *_AS_STORED,
        (output_head, "_ROWS", 256),
        (output_head, "_block_columns", lambda *_: 2**30),
    ),
    "products: torch's own BLAS": (*_AS_STORED, (onednn_linear, "_AVAILABLE", False)),
    "all of these in torch's form": (
        *_TORCH_ATTENTION,
        *_AS_STORED,
        (elementwise, "kernels", _none),
        (output_head, "kernels", _none),
        (adapted, "takes_frozen", lambda *_: False),
        (onednn_linear, "_AVAILABLE", False),
        (output_head, "_ROWS", 256),
        (output_head, "_block_columns", lambda *_: 2**30),
    ),
}


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure all forms and return the page."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        model, trees = _inputs(options, Path(name))
        cases = _cases(options, model, trees)
        turns: list[dict[str, float]] = []
        for repeat in range(options.repeats + 1):
            turns.append({name: _seconds(model, *case) for name, case in cases.items()})
            log(f"turn {repeat} of {options.repeats}")
    page = _page(turns[1:], options)  # the first turn warms up
    print(page, flush=True)
    if options.save:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "parts.md").write_text(page, encoding="utf-8")
    return page


def _cases(
    options: argparse.Namespace, model: Any, trees: Sequence[Example]
) -> dict[str, tuple[Patches, list[MicroBatch]]]:
    """What each turn measures: the engine's names to replace, and the micro-batches."""

    def batches(budget: int) -> list[MicroBatch]:
        plan = micro_batches(model, trees, budget)
        return [collate([trees[i] for i in members]) for members in plan]

    usual = batches(options.tokens)
    cases = {form: (patches, usual) for form, patches in FORMS.items()}
    cases |= {_budget(tokens): ((), batches(tokens)) for tokens in options.budgets}
    wanted = _logp(model, usual)
    for name, (patches, made) in cases.items():
        with _patched(patches):
            found = _logp(model, made)
        if abs(found - wanted) > 1e-5 * abs(wanted):
            raise SystemExit(f"{name}: log-probs add up to {found}, as shipped to {wanted}")
    return cases


def _budget(tokens: int) -> str:
    return f"{tokens} tokens a micro-batch" if tokens > 1 else "one pair a micro-batch"


def _logp(model: Any, batches: Sequence[MicroBatch]) -> float:
    with torch.no_grad():
        return sum(float(sequence_logps(model, batch).sum()) for batch in batches)


def _inputs(options: argparse.Namespace, scratch: Path) -> tuple[Any, list[Example]]:
    write_model(options.size, options.tokenizer, scratch / "model")
    write_first_lines(options.pairs_file, options.pairs, scratch / "pairs.jsonl")
    trees = read_trees("dpo", scratch / "model", DataSource(path=str(scratch / "pairs.jsonl")))
    model = load_model(scratch / "model", dtype=torch.float32)
    lora = ADAPTERS["dpo"]
    settings = LoraSettings(rank=lora.rank, alpha=lora.alpha, target_modules=tuple(lora.targets))
    weights = LoraWeights(settings, SEED, "base")
    preparation = Preparation(attention="segments", weights=weights, reordered=True)
    model = prepare_model(model, FOR_TRAINING, preparation)
    model.train()
    return model, trees


def _seconds(model: Any, patches: Patches, batches: Sequence[MicroBatch]) -> float:
    with _patched(patches):
        began = time.perf_counter()
        with torch.no_grad(), LoraWeights(LoraSettings()).reference(model):
            for batch in batches:
                sequence_logps(model, batch)
        for batch in batches:
            sequence_logps(model, batch).sum().backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - began


@contextmanager
def _patched(patches: Patches) -> Iterator[None]:
    before = [(place, name, getattr(place, name)) for place, name, _ in patches]
    for place, name, value in patches:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _plain_blocks(
    whole: output_head.Head, columns: int, dtype: torch.dtype
) -> Iterator[tuple[int, onednn_linear.Plain]]:
    for start in range(0, whole.weight.shape[0], columns):
        yield start, onednn_linear.Plain(whole.weight[start : start + columns].to(dtype))


def _page(turns: Sequence[dict[str, float]], options: argparse.Namespace) -> str:
    lines = [
        f"# Parts of the engine, {options.size}M parameters",
        "",
        f"Reference pass, forward and backward of {options.pairs} pairs in float32, one part at a "
        f"time in a plainer form; {len(turns)} turns. `python -m benchmarks.parts --size "
        f"{options.size} --pairs {options.pairs} --repeats {options.repeats}`.",
        "",
        "| form | seconds | times as shipped (lowest to highest) |",
        "|---|---|---|",
        *(_row(name, turns) for name in FORMS),
        "",
        f"Token budgets, against {options.tokens}:",
        "",
        "| budget | seconds | times as shipped (lowest to highest) |",
        "|---|---|---|",
        *(_row(_budget(tokens), turns) for tokens in options.budgets),
    ]
    here = Environment.here(options.threads)
    lines += ["", f"{here.processor}, threads: {here.threads}. {here.versions}.", ""]
    return "\n".join(lines)


def _row(name: str, turns: Sequence[dict[str, float]]) -> str:
    ratios = sorted(turn[name] / turn["as shipped"] for turn in turns)
    seconds = median(turn[name] for turn in turns)
    spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if name != "as shipped" else ""
    return f"| {name} | {seconds:.2f} | {median(ratios):.2f}{spread} |"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Callable[..., Any] = parser.add_argument
    add("--size", type=int, choices=(1, 10, 60, 150), default=60, help="million parameters")
    add("--pairs", type=int, default=4)
    add("--tokens", type=int, default=2048, help="token budget of a micro-batch")
    add("--budgets", type=int, nargs="*", default=(1, 512, 1024, 4096), help="other budgets")
    add("--repeats", type=int, default=5)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--save", action="store_true", help="also write parts.md to --results")
    add("--results", type=Path, default=RESULTS)
    add("--pairs-file", type=Path, default=SHARED / "pairs" / "orca_dpo_pairs.jsonl")
    add("--tokenizer", type=Path, default=SHARED / "tokenizers" / "mistral_v1_32000")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
