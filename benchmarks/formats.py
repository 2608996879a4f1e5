"""Number formats and compiling on CPU: `python -m benchmarks.formats`.

The embedded demo model is fine-tuned on the demo's instructions: as it is, with its base in 4 bits,
and compiled. The 4-bit adapter is then merged twice, into the weights it was trained on and into
the original ones, and each model is asked for the answers to questions that no one trained on. The
weights' bytes are those of one decoder layer of Mistral-7B's shape.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MistralConfig

from tandem.demo.embedded import materialise
from tandem.model.load_model import load_adapter, load_base, load_model
from tandem.model.model_folder import QUANTIZATION, load_tokenizer
from tandem.model.quantize import quantize
from tandem.recipe.data_source import DataSource
from tandem.recipe.jobs import MergeJob, TrainingJob
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import LoraSettings, MergeSettings, SftSettings
from tandem.stages.merge import run_merge
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json, read_jsonl

from .record import Environment, log
from .tables import RESULTS
from .work import SEED

COMMAND = "python -m benchmarks.formats"
_QUIET = Console(quiet=True)
_LEARNING_RATE = 2e-3
RUNS: dict[str, dict[str, Any]] = {
    "whole": {},
    "base in 4 bits": {"quantization": "nf4"},
    "compiled": {"compile": True},
}


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, and return the page."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        scratch = Path(name)
        # Nothing that an earlier run has compiled.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
        seconds: dict[str, list[float]] = {run: [] for run in RUNS}
        compiling: list[float] = []
        for repeat in range(options.repeats):
            for run, settings in RUNS.items():
                folder = scratch / f"{run}-{repeat}".replace(" ", "-")
                summary = read_json(_sft(folder, options, settings) / "summary.json")
                seconds[run].append(summary["train_seconds"])
                compiling += [summary["compile_seconds"]] if run == "compiled" else []
                log(f"{repeat + 1}/{options.repeats} {run}: {seconds[run][-1]:.1f} s")
        losses = _losses(scratch, options)
    page = _page(seconds, max(compiling), losses, layer_bytes(options.hidden), options)
    print(page, flush=True)
    if options.save:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "formats.md").write_text(page, encoding="utf-8")
    return page


def _sft(folder: Path, options: argparse.Namespace, run: dict[str, Any]) -> Path:
    settings = SftSettings(
        data=(DataSource(path="demo:instructions"),),
        batch_size=32,
        max_steps=options.steps,
        learning_rate=_LEARNING_RATE,
        max_length=256,
        lora=LoraSettings(rank=16, alpha=32),
    )
    return run_sft(TrainingJob(_run("demo:base", folder, **run), settings), _QUIET)


def _run(model: str, folder: Path, **settings: Any) -> RunSettings:
    common = {"chat_template": "neural-chat", "seed": SEED, "device": "cpu"}
    return RunSettings(model=model, output_dir=str(folder), **{**common, **settings})


def _losses(scratch: Path, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Of each model, the loss of an answer's token, and its distance from the trained one's."""
    base, adapter = materialise("demo:base", Path(), seed=0), scratch / "base-in-4-bits-0"
    tokenizer = load_tokenizer(adapter)
    questions = read_jsonl(materialise("demo:questions", scratch, seed=SEED))
    asked = [_asked(tokenizer, row) for row in questions[: options.questions]]

    def merged(name: str, source: Path) -> Any:
        run = _run(str(base), scratch / name, chat_template=None)
        run_merge(MergeJob(run, MergeSettings(dtype="float32"), source, force=True), _QUIET)
        return load_model(scratch / name, dtype=torch.float32)

    seen = load_base(base, adapter, dtype=torch.float32)
    models = {
        "the 4-bit base without an adapter": _logps(seen, asked),
        "4-bit base and adapter, as trained": _logps(load_adapter(seen, adapter), asked),
        "merged into the weights it was trained on": _logps(merged("seen", adapter), asked),
    }
    (adapter / QUANTIZATION).unlink()
    models["merged into the original weights"] = _logps(merged("original", adapter), asked)
    models["trained on the whole base, merged"] = _logps(merged("w", scratch / "whole-0"), asked)
    trained = models["4-bit base and adapter, as trained"]
    return {
        name: (-float(logps.mean()), float((logps - trained).abs().mean()))
        for name, logps in models.items()
    }


def _asked(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], int]:
    """Token ids of a question with its answer, and where the answer begins."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["question"]}],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
    return [*prompt, *answer], len(prompt)


def _logps(model: Any, asked: Sequence[tuple[list[int], int]]) -> Tensor:
    """Log-probs of all answers' tokens, one question at a time through full logits."""
    found = []
    with torch.no_grad():
        for ids, start in asked:
            row = torch.tensor([ids])
            logps = model(input_ids=row, use_cache=False).logits[0].log_softmax(-1)
            found.append(logps[start - 1 : -1].gather(1, row[0, start:, None])[:, 0])
    return torch.cat(found).double()


def layer_bytes(hidden: int) -> tuple[int, int]:
    """Bytes of a decoder layer of Mistral-7B's proportions, in bfloat16 and in 4 bits."""
    config = MistralConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=1,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=max(1, hidden // 512),
        head_dim=128,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layers = model.get_decoder().layers
    before = _bytes(layers)
    quantize(model, source=torch.bfloat16, compute=torch.bfloat16, device=torch.device("cpu"))
    return before, _bytes(layers)


def _bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, scales of 4-bit ones included."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            scales = (
                state.absmax,
                state.code,
                state.offset,
                state.state2.absmax,
                state.state2.code,
            )
            total += sum(tensor.nbytes for tensor in scales)
    return total


def _page(
    seconds: dict[str, list[float]],
    compiling: float,
    losses: dict[str, tuple[float, float]],
    weights: tuple[int, int],
    options: argparse.Namespace,
) -> str:
    environment = Environment.here(options.threads, "cpu")

    def times(found: Sequence[float]) -> str:
        ratios = [one / usual for one, usual in zip(found, seconds["whole"], strict=True)]
        return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    lines = [
        "# Number formats and compiling, on a CPU",
        "",
        f"The demo model, {options.steps} SFT steps of 32 conversations in float32; medians of "
        f"{options.repeats} runs that took turns. `{COMMAND} --steps {options.steps} --repeats "
        f"{options.repeats} --threads {options.threads}`. {environment.processor}, "
        f"{options.threads} threads; {environment.versions}.",
        "",
        "| run | seconds in the loop | times whole, within a turn (lowest to highest) |",
        "|---|---|---|",
        *(f"| {name} | {median(found):.1f} | {times(found)} |" for name, found in seconds.items()),
        "",
        f"Compiling took {compiling:.1f} s more, before the loop. Uncompiled, norms and gated MLPs "
        "are C.",
        "",
        f"Answers to {options.questions} questions that no stage trained on, float32:",
        "",
        "| model | loss of a token, nats | mean distance of its log-prob from the trained one's |",
        "|---|---|---|",
        *(f"| {name} | {loss:.4f} | {off:.2g} |" for name, (loss, off) in losses.items()),
        "",
        f"A decoder layer of {options.hidden} columns in Mistral-7B's proportions: "
        f"{weights[0] / 2**20:.1f} MiB in bfloat16, {weights[1] / 2**20:.1f} MiB in 4 bits, "
        f"{weights[0] / weights[1]:.2f} times less.",
    ]
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--steps", type=int, default=60)
    add("--repeats", type=int, default=3)
    add("--questions", type=int, default=200)
    add("--hidden", type=int, default=4096)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--results", type=Path, default=RESULTS)
    add("--save", action="store_true", help="also write the page to --results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
