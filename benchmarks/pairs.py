"""How fast answers are generated for pairs: `python -m benchmarks.pairs --help`.

The same prompts, of real instruction data, are answered by tandem's batches and by transformers'
`generate`, one prompt at a time, both with a KV cache. They take turns; the ratio is the median of
each turn's tokens a second. The likeliest tokens first, where both sides must say the same but for
rounding; then sampled, where answers end at different places.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tandem.data.ledger import Ledger
from tandem.data.sources.chunks import Row
from tandem.data.sources.rows import read_rows
from tandem.data.tokenize.chat_template import prompt_ids, resolve_template, stop_ids
from tandem.model.generate import Sampling, generate_answers
from tandem.model.load_model import load_model
from tandem.model.model_folder import context_length, load_tokenizer, model_folder
from tandem.pairs.prompts import read_prompts
from tandem.recipe.data_source import DataSource

from .record import Environment, log
from .tables import RESULTS
from .training import SHARED

_TEMPERATURES = {"likeliest": 0.0, "sampled": 0.8}
_LONGEST = 300


@dataclass(frozen=True)
class Asked:
    """A model and what it is asked."""

    name: str
    model: Any
    prompts: list[list[int]]
    stops: list[int]
    limit: int


@dataclass(frozen=True)
class Run:
    """One side's answers and seconds."""

    answers: list[tuple[int, ...]]
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second, end tokens not counted."""
        return sum(map(len, self.answers)) / self.seconds


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print the page, and return it."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        asked = _asked(name, options)
        for how, temperature in _TEMPERATURES.items():
            rows.append(_measured(asked, how, temperature, options.repeats))
    page = _page(rows, options)
    print(page, end="", flush=True)
    if options.save:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "pairs.md").write_text(page, encoding="utf-8")
    return page


def _asked(name: str, options: argparse.Namespace) -> Asked:
    folder = model_folder(name)
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    template = resolve_template(tokenizer, None)
    context = context_length(model.config) or 2**31
    prompts: list[list[int]] = []
    source = DataSource(path=str(options.prompts))
    if not any(isinstance(row, Row) for row in read_rows(source)):
        raise SystemExit(f"{options.prompts} has no records")
    for prompt in read_prompts([source], "different", Ledger()):
        if len(prompt.question) <= _LONGEST:
            ids = prompt_ids(tokenizer, template, prompt.turns)
            if len(ids) + options.tokens <= context:
                prompts.append(ids)
        if len(prompts) == options.count:
            break
    if len(prompts) < options.count:
        raise SystemExit(f"{options.prompts} has only {len(prompts)} prompts that fit {name}")
    return Asked(Path(name).name, model, prompts, stop_ids(tokenizer, template), options.tokens)


def _measured(asked: Asked, how: str, temperature: float, repeats: int) -> tuple[str, ...]:
    sides: dict[str, Callable[[Asked, float, int], Run]] = {"tandem": _batched, "alone": _alone}
    runs: dict[str, list[Run]] = {side: [] for side in sides}
    for repeat in range(repeats):
        names = list(sides) if repeat % 2 == 0 else list(sides)[::-1]
        for side in names:
            runs[side].append(sides[side](asked, temperature, repeat))
            done = runs[side][-1]
            log(f"{asked.name}, {how}, {side}: {done.seconds:.1f} s, {done.rate:.0f} tokens/s")
    return row(asked.name, how, runs["tandem"], runs["alone"])


def row(name: str, how: str, ours: Sequence[Run], alone: Sequence[Run]) -> tuple[str, ...]:
    """A line of the table, from the runs of both sides in the order of their turns."""
    same = "-"
    if _TEMPERATURES[how] == 0:
        pairs = zip(ours[0].answers, alone[0].answers, strict=True)
        same = f"{sum(a == b for a, b in pairs)} of {len(ours[0].answers)}"
    ratios = [a.rate / b.rate for a, b in zip(ours, alone, strict=True)]
    rates = [median(run.rate for run in runs) for runs in (ours, alone)]
    spread = f"{median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
    return (name, how, *(f"{rate:.0f}" for rate in rates), spread, same)


def _batched(asked: Asked, temperature: float, seed: int) -> Run:
    began = time.perf_counter()
    answers = generate_answers(
        asked.model,
        asked.prompts,
        stop_ids=asked.stops,
        sampling=Sampling(asked.limit, temperature, seed=seed),
    )
    return Run([answer.ids for answer in answers], time.perf_counter() - began)


def _alone(asked: Asked, temperature: float, seed: int) -> Run:
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0}
    torch.manual_seed(seed)
    began = time.perf_counter()
    answers = []
    for prompt in asked.prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            output = asked.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=asked.limit,
                eos_token_id=asked.stops,
                pad_token_id=asked.stops[0],
                top_k=0 if temperature else None,
                **sampling,
            )
        found = output[0, len(prompt) :].tolist()
        ends = [place for place, token in enumerate(found) if token in asked.stops]
        answers.append(tuple(found[: ends[0]] if ends else found))
    return Run(answers, time.perf_counter() - began)


def _page(rows: Sequence[Sequence[str]], options: argparse.Namespace) -> str:
    here = Environment.here(options.threads)
    head = ("model", "tokens", "tandem, tokens/s", "one at a time, tokens/s", "ratio",
            "same answers")  # fmt: skip
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"""\
# Generating answers

`python -m benchmarks.pairs --save --tokens {options.tokens} --threads {here.threads}`:
{options.count} prompts of real instruction data, medians of {options.repeats} runs that took turns,
float32, {here.processor}. In brackets the lowest and the highest.
{here.versions}.

{table}

"One at a time" is transformers' `generate`, prompt by prompt, with its KV cache. Where the
likeliest tokens are taken, both sides do the same; answers that differ do so by rounding.
"""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=[str(SHARED / "models" / "stories260K"), "demo:base"],
        help="model folders",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=SHARED / "conversations" / "slimorca_format.jsonl",
        help="an instruction set",
    )
    parser.add_argument("--count", type=int, default=256, help="prompts")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="write the page to the results")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
