"""The recipe neural-chat-7b-v3-1 at its own size: `python -m benchmarks.real_size --help`.

A model of Mistral-7B's shape with random bfloat16 weights goes through both stages on real records:
supervised fine-tuning, merge, DPO, merge, evaluation, chat. Each is a command in a process of its
own, of which time, memory and bytes read are measured. On a CPU the stages take two steps of a few
short records; on a GPU, steps of the recipe's own batch and lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from tandem.model.shard_writer import ShardWriter, TensorKind
from tandem.storage.atomic_files import atomic_write_json, read_json

from .apart import ROOT
from .record import Environment, log
from .roofline import gemm_rates
from .tables import RESULTS
from .training import SHARED

_SHAPE: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    "dtype": "bfloat16",
}  # fmt: skip
_SHARDS = 3
_DRAWN = 1 << 24  # random numbers that are drawn; all weights are made of them
# On a CPU: records of a step, records in all, and their longest.
_BATCH, _RECORDS, _LENGTH = 2, 8, 512
_STEPS = 2
_ANSWERS = (4, 20)  # tokens of chat's answers; the difference is what writing takes
_EVERY_SECONDS = 0.2
_LIMIT_BYTES, _LIMIT_MINUTES = 20 * 2**30, 60


@dataclass(frozen=True)
class Ran:
    """A command that has ended: what it took, and what is to be said of its speed."""

    name: str
    seconds: float
    peak: int  # bytes of its process that were in memory at once, pages of files included
    own: int  # those without pages of files
    read: int  # bytes that it read, from memory or from the disk; mapped weights do not count
    disk: int  # bytes that came from the disk for it
    notes: tuple[str, ...] = field(default=())


def main(arguments: Sequence[str] | None = None) -> str:
    """Run everything, print the page, and return it."""
    options = _parse(arguments)
    shape = _SHAPE | {"num_hidden_layers": options.layers}
    size = 2 * sum(torch.Size(one).numel() for one in _tensors(shape).values())
    log(f"two models of {size / 1e9:.1f} GB are written to {options.scratch or 'a scratch folder'}")
    with tempfile.TemporaryDirectory(prefix="tandem-bench-", dir=options.scratch) as name:
        scratch = Path(name)
        if (free := shutil.disk_usage(scratch).free) < 2.2 * size:
            raise SystemExit(
                f"{scratch} has {free / 1e9:.1f} GB free, and {2.2 * size / 1e9:.1f} GB are "
                "needed. Name another folder with --scratch."
            )
        began = time.perf_counter()
        write_model(scratch / "base", shape, options.tokenizer)
        written = time.perf_counter() - began
        ran = list(_stages(scratch, shape, options))
    text = page(options, size, written, ran)
    print(text, flush=True)
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "real-size.md").write_text(text, encoding="utf-8")
    return text


def write_model(folder: Path, shape: Mapping[str, Any], tokenizer: Path) -> None:
    """A model folder of random weights, never more than one of them in memory."""
    folder.mkdir(parents=True)
    for file in tokenizer.iterdir():
        shutil.copyfile(file, folder / file.name)
    atomic_write_json(folder / "config.json", dict(shape))
    drawn = torch.randn(_DRAWN, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    tensors = _tensors(shape)
    files: dict[str, list[str]] = {}
    total, before = sum(torch.Size(one).numel() for one in tensors.values()), 0
    for name, one in tensors.items():
        number = before * _SHARDS // total + 1
        files.setdefault(f"model-{number:05}-of-{_SHARDS:05}.safetensors", []).append(name)
        before += torch.Size(one).numel()
    for shard, names in files.items():
        kinds = {name: TensorKind(tensors[name], torch.bfloat16) for name in names}
        writer = ShardWriter(folder / shard, kinds)
        for place, name in enumerate(names):
            numbers = torch.Size(tensors[name]).numel()
            if len(tensors[name]) == 1:  # a norm
                values = torch.ones(numbers, dtype=torch.bfloat16)
            else:
                values = drawn.roll(7919 * place).repeat(numbers // _DRAWN + 1)[:numbers]
            writer.write(name, values.view(tensors[name]))
        writer.check_whole()
        writer.close()
    index = {name: shard for shard, names in files.items() for name in names}
    where = {"metadata": {"total_size": 2 * total}, "weight_map": index}
    atomic_write_json(folder / "model.safetensors.index.json", where)


def _tensors(shape: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a Mistral model's weights, by name."""
    hidden, inner, rows = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    layer = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden)}
    for number in range(shape["num_hidden_layers"]):
        found |= {f"model.layers.{number}.{name}.weight": one for name, one in layer.items()}
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (rows, hidden)}


def _stages(scratch: Path, shape: Mapping[str, Any], options: argparse.Namespace) -> Iterator[Ran]:
    """Run the recipe's stages, one after the other; each needs what the ones before it made."""
    base, sft, middle, dpo, final = (
        scratch / name for name in ("base", "sft", "middle", "dpo", "final")
    )
    data = _data(scratch, options)
    rates = _rates(options.device)
    log(f"{rates[0] / 1e9:.0f} GFLOP/s in products, {rates[1] / 1e9:.1f} GB/s read from memory")
    steps = ["--max_steps", str(_STEPS), "--save_steps", "1000", "--logging_steps", "1"]
    if options.device == "cpu":
        steps += ["--batch_size", str(_BATCH), "--max_length", str(_LENGTH)]
        steps += ["--gradient_checkpointing", "true"]
    run = _Runs(scratch, options.device)
    yield run("sft", ["sft", "--model_name_or_path", str(base), "--dataset_name", data["sft"],
                      "--output_dir", str(sft), *steps], _speed(sft, shape, rates))  # fmt: skip
    yield run("merge", _merge(base, sft, middle))
    shutil.rmtree(base)
    yield run("dpo", ["dpo", "--model_name_or_path", str(middle), "--dataset_name", data["dpo"],
                      "--output_dir", str(dpo), *steps], _speed(dpo, shape, rates))  # fmt: skip
    yield run("merge", _merge(middle, dpo, final))
    shutil.rmtree(middle)
    asked = ["--questions", data["asked"], "--limit", "3", "--max_new_tokens", "4"]
    kept = ["--output_dir", str(scratch / "evaluation")]
    yield run("evaluation", ["eval", str(final), "--pairs", data["dpo"], *asked, *kept])
    few, many = (
        run("chat", ["chat", str(final), "--chat_template", "neural-chat", "--temperature", "0",
                     "--max_new_tokens", str(tokens)])
        for tokens in _ANSWERS
    )  # fmt: skip
    each = (many.seconds - few.seconds) / (_ANSWERS[1] - _ANSWERS[0])
    weights = 2 * sum(
        torch.Size(one).numel() for name, one in _tensors(shape).items() if "embed" not in name
    )
    yield Ran(
        f"chat, {_ANSWERS[1]} tokens", many.seconds, many.peak, many.own, many.read, many.disk,
        (f"{each:.2f} s a token: {weights / each / 1e9:.1f} GB/s of weights, "
         f"{weights / each / rates[1]:.0%} of what is read from memory",),
    )  # fmt: skip


def _merge(base: Path, adapter: Path, output: Path) -> list[str]:
    return ["merge", "--base-model-path", str(base), "--lora-model-path", str(adapter),
            "--output-path", str(output)]  # fmt: skip


def _data(scratch: Path, options: argparse.Namespace) -> dict[str, str]:
    """The real records, as many as are needed, and questions."""
    paths = {
        "sft": SHARED / "conversations" / "slimorca_format.jsonl",
        "dpo": SHARED / "pairs" / "orca_dpo_pairs.jsonl",
    }
    if options.device == "cpu":
        for name, path in paths.items():
            with path.open(encoding="utf-8") as file:
                # Short ones are chosen by their text; nothing is cut.
                short = (line for line in file if len(line) < 3 * _LENGTH)
                paths[name] = scratch / f"{name}.jsonl"
                paths[name].write_text("".join(islice(short, _RECORDS)), encoding="utf-8")
    asked = scratch / "questions.jsonl"
    lines = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in (2, 3, 4)]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {**{name: str(path) for name, path in paths.items()}, "asked": str(asked)}


def _rates(device: str) -> tuple[float, float]:
    """Operations a second of a product, and bytes a second that are read from memory."""
    numbers = torch.ones(1 << 29, device=device)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        float(numbers.sum())
        best = max(best, numbers.nbytes / (time.perf_counter() - began))
    return max(gemm_rates(device).values()), best


def _speed(folder: Path, shape: Mapping[str, Any], rates: tuple[float, float]) -> Any:
    """What a training stage's summary says of its speed, once it is written."""
    weights = sum(torch.Size(one).numel() for n, one in _tensors(shape).items() if ".layers." in n)

    def speed() -> tuple[str, ...]:
        said = read_json(folder / "summary.json")
        steps = 4 * weights * said["tokens"] / said["train_seconds"]
        notes = [
            f"{said['tokens']} tokens in {said['train_seconds']:.0f} s of {said['steps']} steps: "
            f"{steps / 1e9:.0f} GFLOP/s needed, {steps / rates[0]:.0%} of the product rate"
        ]
        if said["reference_computed"]:
            notes.append(
                f"the reference of {said['reference_computed']} pairs in "
                f"{said['reference_seconds']:.0f} s"
            )
        return tuple(notes)

    return speed


class _Runs:
    """Runs commands of tandem in processes of their own, and watches them."""

    def __init__(self, scratch: Path, device: str) -> None:
        self._device = device
        self._environment = os.environ | {
            "XDG_CACHE_HOME": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"
        }  # fmt: skip

    def __call__(self, name: str, command: list[str], notes: Any = tuple) -> Ran:
        """Run one; raises SystemExit with its last words when it fails."""
        words = [sys.executable, "-m", "tandem", *command, "--device", self._device]
        log(" ".join(words[3:]))
        with tempfile.TemporaryFile("w+") as output:
            began = time.perf_counter()
            process = subprocess.Popen(
                words, cwd=ROOT, env=self._environment, stdin=subprocess.PIPE, stdout=output,
                stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            assert process.stdin is not None
            process.stdin.write("Tell me about the sea.\n")
            process.stdin.close()
            seen = _Watched(process.pid)
            while process.poll() is None:
                seen.look()
                time.sleep(_EVERY_SECONDS)
            seconds = time.perf_counter() - began
            output.seek(0)
            said = output.read()
        if process.returncode != 0:
            raise SystemExit(f"{name} failed:\n{said[-4000:]}")
        log(f"{name}: {seconds:.0f} s, {seen.peak / 2**30:.1f} GiB")
        return Ran(name, seconds, seen.peak, seen.own, seen.read, seen.disk, notes())


class _Watched:
    """What Linux says of a process while it runs."""

    def __init__(self, pid: int) -> None:
        self._folder = Path("/proc") / str(pid)
        self.peak = self.own = self.read = self.disk = 0

    def look(self) -> None:
        """Take note."""
        try:
            status = dict(_pairs(self._folder / "status"))
            files = dict(_pairs(self._folder / "io"))
        except OSError:  # it has just ended
            return
        if "VmHWM" not in status:
            return
        self.peak = max(self.peak, 1024 * int(status["VmHWM"].split()[0]))
        self.own = max(self.own, 1024 * int(status["RssAnon"].split()[0]))
        self.read, self.disk = int(files["rchar"]), int(files["read_bytes"])


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        yield key, value.strip()


def page(options: argparse.Namespace, size: int, written: float, ran: Sequence[Ran]) -> str:
    """The results as a page."""
    numbers = f"{size / 2e9:.2f} billion random bfloat16 weights"
    lengths = f"{_BATCH} records a step, at most {_LENGTH} tokens, activations recomputed"
    lines = [
        "# The recipe at its own size",
        "",
        f"`python -m benchmarks.real_size` on {options.device}: Mistral's shape with "
        f"{options.layers} layers, {numbers} ({size / 1e9:.1f} GB). The recipe neural-chat-7b-v3-1 "
        f"with its own adapters, {_STEPS} steps a stage"
        + (f"; {lengths}." if options.device == "cpu" else ", its own batch and lengths."),
        "",
        "| stage | minutes | memory | without pages of files | read | from the disk | speed |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.name} | {one.seconds / 60:.1f} | {one.peak / 2**30:.1f} GiB | "
        f"{one.own / 2**30:.1f} GiB | {one.read / 1e9:.1f} GB | {one.disk / 1e9:.1f} GB | "
        f"{'; '.join(one.notes)} |"
        for one in ran
    ]
    minutes = (written + sum(one.seconds for one in ran)) / 60
    most = max(one.peak for one in ran)
    environment = Environment.here(len(os.sched_getaffinity(0)), options.device)
    kept = most <= _LIMIT_BYTES and minutes <= _LIMIT_MINUTES
    lines += [
        "",
        f"{minutes:.0f} minutes, the writing of the model ({written / 60:.1f}) included, and at "
        f"most {most / 2**30:.1f} GiB: {'within' if kept else '**beyond**'} {_LIMIT_MINUTES} "
        f"minutes and {_LIMIT_BYTES >> 30} GiB. A stage's time is that of its whole command, "
        "imports and hashes included. Needed are 4 operations for each weight of the layers and "
        "token; computing activations again adds half as much. Memory is that of one process; what "
        "lies in pages of the weights' files is let go when memory is needed. Read is what the "
        "process asked for; weights that it maps are not in it.",
        "",
        f"{environment.processor}, cores: {environment.threads}. {environment.versions}.",
    ]
    if options.device == "cpu":
        lines += ["", "On CUDA: not measured."]
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", type=int, default=_SHAPE["num_hidden_layers"], help="fewer, for a trial")
    add("--tokenizer", type=Path, default=SHARED / "tokenizers" / "mistral_v1_32000")
    add("--scratch", type=Path, help="where the models are put meanwhile: 32 GB")
    add("--device", choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu")  # fmt: skip
    add("--save", action="store_true", help="also write benchmarks/results/real-size.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
