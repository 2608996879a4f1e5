"""Make the demo's base model: `python -m tandem.demo.pretrain --output DIR`.

The corpus, the tokenizer and the weights are made here; the result is a plain transformers folder.
With `--steps` the run depends on its seed alone; with `--minutes` the schedule follows the clock.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.demo.corpus import BOS, CONTEXT, EOS, documents, train_tokenizer
from tandem.demo.facts import Fact, all_facts

DEFAULT_STEPS = 1700
PEAK_LEARNING_RATE = 3e-3
WARMUP = 0.03


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to train (`steps`, or else `minutes`), on `rows` of `row_length` tokens."""

    steps: int | None
    minutes: float | None
    rows: int = 8
    row_length: int = 256
    seed: int = 0


def build_model(tokenizer: Any, seed: int) -> Any:
    """Return a randomly initialised model of Mistral's architecture with about 3M parameters."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        sliding_window=None,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return MistralForCausalLM(config)


def batches(tokenizer: Any, plan: Plan) -> Iterator[Tensor]:
    """Yield endless batches of packed documents, each between BOS and EOS.

    They are int64 [rows, row_length + 1]: inputs and, shifted by one, targets.
    """
    stream: list[int] = []
    size = plan.rows * (plan.row_length + 1)
    for document in documents(plan.seed):
        stream += tokenizer.encode(f"{BOS}{document}{EOS}", add_special_tokens=False)
        while len(stream) >= size:
            yield torch.tensor(stream[:size]).view(plan.rows, plan.row_length + 1)
            del stream[:size]


def pretrain(model: Any, tokenizer: Any, plan: Plan) -> None:
    """Train `model` in place with AdamW, warm-up and cosine decay, printing the loss."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    model.train()
    start = time.monotonic()
    for step, batch in enumerate(batches(tokenizer, plan)):
        elapsed = time.monotonic() - start
        done = step / plan.steps if plan.steps else elapsed / (60 * (plan.minutes or 1))
        if done >= 1:
            return
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * schedule(done)
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            tokens = (step + 1) * plan.rows * plan.row_length
            print(f"step {step} loss {loss.item():.4f} tokens {tokens} {elapsed:.0f}s", flush=True)
        if step % 250 == 249:
            _print_accuracy(model, tokenizer, all_facts()[::4], "every fourth fact")
            model.train()


def schedule(done: float) -> float:
    """Return the rate's factor at the share `done` of the run: linear up, then cosine to 2 %."""
    if done < WARMUP:
        return done / WARMUP
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP)))


@torch.no_grad()
def completion_accuracy(model: Any, tokenizer: Any, facts: Sequence[Fact]) -> float:
    """Return the share of facts whose answer is the greedy continuation of its beginning."""
    model.eval()
    right = 0
    for start in range(0, len(facts), 64):
        chunk = facts[start : start + 64]
        prompts = [BOS + fact.completion for fact in chunk]
        encoded = tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False,
            return_token_type_ids=False,
        )  # fmt: skip
        output = model.generate(**encoded, max_new_tokens=12, do_sample=False)
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        right += sum(t.startswith(f.answer) for t, f in zip(texts, chunk, strict=True))
    return right / len(facts)


def _print_accuracy(model: Any, tokenizer: Any, facts: Sequence[Fact], name: str) -> None:
    print(f"completed: {completion_accuracy(model, tokenizer, facts):.3f} of {name}", flush=True)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer as bfloat16 safetensors, and print the saved model's accuracy."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    _print_accuracy(saved, AutoTokenizer.from_pretrained(folder), all_facts(), "all, as saved")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB, {saved.num_parameters() / 1e6:.2f}M parameters")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tandem.demo.pretrain", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"optimizer steps (default {DEFAULT_STEPS})")
    length.add_argument("--minutes", type=float, help="train this long instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    steps = None if options.minutes else options.steps or DEFAULT_STEPS
    plan = Plan(steps=steps, minutes=options.minutes, seed=options.seed)
    tokenizer = train_tokenizer(seed=plan.seed)
    model = build_model(tokenizer, plan.seed)
    print(f"{len(all_facts())} facts, vocabulary {len(tokenizer)}", flush=True)
    pretrain(model, tokenizer, plan)
    options.output.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, options.output)


if __name__ == "__main__":
    main()
