"""The plain way of doing what tandem does: transformers, peft, padding, full logits, no tandem.

Nothing here imports tandem, so that nothing of it can agree with itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup
from transformers.models.llama.modeling_llama import LlamaRMSNorm

CONTEXT = 256
RANK, ALPHA = 4, 8
RATE = 1e-3
# AdamW takes a whole step where a gradient is rounding noise alone: with its usual 1e-8 even this
# plain loop is 5e-4 from itself in float64, and with 1e-5 two orders of summation, both 1e-5 from
# float64's gradient, end 1e-4 apart.
EPSILON = 1e-4


@dataclass(frozen=True)
class Labelled:
    """Token ids of one sequence and, for each, whether it is trained."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True)
class Pair:
    """A preference pair as messages and as token ids."""

    prompt: list[dict[str, str]]
    chosen: list[dict[str, str]]
    rejected: list[dict[str, str]]
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def sequences(self) -> tuple[Labelled, Labelled]:
        """Chosen and rejected, the answer's tokens trained."""
        return self._sequence(self.chosen_ids), self._sequence(self.rejected_ids)

    def _sequence(self, answer: list[int]) -> Labelled:
        trained = [False] * len(self.prompt_ids) + [True] * len(answer)
        return Labelled(self.prompt_ids + answer, trained)


def read_pairs(path: Path, tokenizer: Any, count: int) -> tuple[list[Pair], list[dict[str, Any]]]:
    """The first `count` pairs that fit the context whole, with the rows they come from."""
    pairs, rows = [], []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        pair = _pair(row, tokenizer)
        longest = max(len(sequence.ids) for sequence in pair.sequences())
        if longest <= CONTEXT:
            pairs.append(pair)
            rows.append(row)
        if len(pairs) == count:
            return pairs, rows
    raise AssertionError(f"{path} has fewer than {count} pairs that fit {CONTEXT} tokens")


def _pair(row: dict[str, Any], tokenizer: Any) -> Pair:
    prompt = [{"role": "user", "content": row["question"]}]
    if row["system"]:
        prompt.insert(0, {"role": "system", "content": row["system"]})
    answers = [[{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected")]
    prompt_ids = template_ids(tokenizer, prompt, generation=True)
    chosen, rejected = (template_ids(tokenizer, prompt + answer) for answer in answers)
    for ids in (chosen, rejected):
        assert ids[: len(prompt_ids)] == prompt_ids
    start = len(prompt_ids)
    return Pair(prompt, *answers, prompt_ids, chosen[start:], rejected[start:])


def read_conversations(
    path: Path, tokenizer: Any, *, single: int, multiple: int
) -> tuple[list[Labelled], list[dict[str, Any]]]:
    """Conversations that fit the context whole: some with one exchange, some with several."""
    wanted = {False: single, True: multiple}
    sequences, rows = [], []
    with path.open() as lines:
        for line in lines:
            if not any(wanted.values()):
                return sequences, rows
            row = json.loads(line)
            answers = [t for t in row["conversations"] if t["from"] == "gpt"]
            several = len(answers) > 1
            if not wanted[several]:
                continue
            sequence = _conversation(row["conversations"], tokenizer)
            if len(sequence.ids) <= CONTEXT and any(sequence.trained):
                wanted[several] -= 1
                sequences.append(sequence)
                rows.append(row)
    raise AssertionError(f"{path} has too few conversations that fit {CONTEXT} tokens")


def _conversation(turns: list[dict[str, Any]], tokenizer: Any) -> Labelled:
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    messages = [{"role": roles[t["from"]], "content": t["value"]} for t in turns]
    ids = template_ids(tokenizer, messages)
    trained = [False] * len(ids)
    for number, turn in enumerate(turns):
        if turn["from"] == "gpt" and turn.get("weight") in (None, 1):
            start = len(template_ids(tokenizer, messages[:number], generation=True))
            stop = len(template_ids(tokenizer, messages[: number + 1]))
            trained[start:stop] = [True] * (stop - start)
    return Labelled(ids, trained)


def template_ids(
    tokenizer: Any, messages: list[dict[str, str]], *, generation: bool = False
) -> list[int]:
    """What plain `apply_chat_template` gives."""
    ids: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=generation, return_dict=False
    )
    return ids


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The plain model, attention through transformers' own padded sdpa path."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def lora_config(**options: Any) -> LoraConfig:
    """The adapter of all peer tests."""
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", **options}
    return LoraConfig(lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", **settings)


def fresh_adapter(model: Any, seed: int) -> Any:
    """peft's own LoRA initialisation: A random, B zero."""
    torch.manual_seed(seed)
    return get_peft_model(model, lora_config())


def trained_parameters(model: Any) -> dict[str, Tensor]:
    """Trainable parameters by peft's names, without the adapter's name."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def move_adapter(model: Any) -> None:
    """Random adapter weights, the same for every model; B leaves zero."""
    generator = torch.Generator().manual_seed(3)
    for _, parameter in sorted(trained_parameters(model).items()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(noise * 0.05)


def padded_batch(sequences: Sequence[Labelled]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and trained mask [S, L] of a batch padded on the right."""
    longest = max(len(s.ids) for s in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    trained = torch.zeros(ids.shape, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        ids[row, :length] = torch.tensor(sequence.ids)
        attention[row, :length] = 1
        trained[row, :length] = torch.tensor(sequence.trained)
    return ids, attention, trained


def padded_logps(model: Any, sequences: Sequence[Labelled]) -> Tensor:
    """Summed log-probability of each sequence's trained tokens [S], from full logits."""
    ids, attention, trained = padded_batch(sequences)
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (logps * trained[:, 1:]).sum(1)


def padded_supervised_loss(model: Any, sequences: Sequence[Labelled]) -> Tensor:
    """transformers' own loss: labels -100 where nothing is trained, mean over the batch."""
    ids, attention, trained = padded_batch(sequences)
    labels = ids.masked_fill(~trained, -100)
    loss: Tensor = model(input_ids=ids, attention_mask=attention, labels=labels).loss
    return loss


def pair_logps(model: Any, pairs: Sequence[Pair]) -> Tensor:
    """[P, 2] chosen and rejected, each pair padded to its longer answer."""
    return torch.stack([padded_logps(model, pair.sequences()) for pair in pairs])


def dpo_loss(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Equation 7 of arXiv 2305.18290, averaged over pairs [P, 2]."""
    ratio = policy - reference
    return -torch.log(torch.sigmoid(beta * (ratio[:, 0] - ratio[:, 1]))).mean()


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The reference: no gradient, no adapter."""
    with torch.no_grad(), model.disable_adapter():
        yield


def keep_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMSNorm without transformers' cast to float32, or no two float64 paths agree to 1e-9."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def assert_close_tensors(
    found: dict[str, Tensor], expected: dict[str, Tensor], limit: float
) -> None:
    """norm(a - b) / norm(b) of every tensor within the limit; the worst is named."""
    assert found.keys() == expected.keys()
    distances = {
        name: float((found[name] - tensor).detach().norm() / tensor.detach().norm())
        for name, tensor in expected.items()
    }
    worst = max(distances, key=lambda name: distances[name])
    assert distances[worst] <= limit, f"{worst} is off by {distances[worst]:.3g}"


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of the trainable parameters, by name; every parameter must have one."""
    found = {name: p.grad for name, p in trained_parameters(model).items()}
    assert all(gradient is not None and gradient.norm() > 0 for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """norm(a - b) / norm(b) of all tensors together."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - tensor).norm()) ** 2 for name, tensor in expected.items())
    norm = sum(float(tensor.norm()) ** 2 for tensor in expected.values())
    return float((difference / norm) ** 0.5)


def train(model: Any, losses: Sequence[Callable[[], Tensor]]) -> None:
    """One AdamW step for each loss: cosine schedule, gradients clipped to norm 1."""
    parameters = list(trained_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, eps=EPSILON)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, len(losses))
    for loss in losses:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
