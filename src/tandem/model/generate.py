"""Answers from a model: many prompts at a time, each batch with its own seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Prompt and answer tokens of one batch, which bounds the KV cache.
_BATCH_TOKENS = 16384
_BATCH_ROWS = 64


@dataclass(frozen=True)
class Answer:
    """Generated token ids without the end token, and whether the model ended by itself."""

    ids: tuple[int, ...]
    stopped: bool


def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    advance: Callable[[int], None],
) -> list[Answer]:
    """One answer to each prompt, in the prompts' order.

    Prompts of similar length share a batch, padded on the left; batches are planned from the
    lengths alone and seeded one by one. Models that keep state across tokens answer one prompt at
    a time: not all of them keep padding, or each other's prompts, out of their state.

    Args:
        model: a causal language model in evaluation mode with transformers' own attention.
        prompts: token ids.
        stop_ids: tokens that end an answer.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token; otherwise samples.
        top_p: share of the probability mass sampled from.
        seed: of the sampling.
        advance: told how many more answers there are.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    rows = 1 if getattr(model, "_is_stateful", False) else _BATCH_ROWS
    answers: dict[int, Answer] = {}
    for number, members in enumerate(_batches(order, prompts, max_new_tokens, rows)):
        torch.manual_seed(seed + number)
        outputs = _generate_batch(
            model,
            [prompts[i] for i in members],
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
        )
        answers.update(zip(members, outputs, strict=True))
        advance(len(members))
    return [answers[i] for i in range(len(prompts))]


def _batches(
    order: Sequence[int], prompts: Sequence[Sequence[int]], max_new_tokens: int, rows: int
) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:
        # Prompts come shortest first, so the newest is the batch's longest.
        length = len(prompts[index]) + max_new_tokens
        full = not batches or len(batches[-1]) >= rows
        if full or (len(batches[-1]) + 1) * length > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> list[Answer]:
    longest = max(len(prompt) for prompt in prompts)
    padding = stop_ids[0]
    ids = torch.full((len(prompts), longest), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    with torch.no_grad():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids),
            pad_token_id=padding,
            top_k=None if temperature == 0 else 0,
            **sampling,
        )
    return [_cut(row, stop_ids) for row in output[:, longest:].tolist()]


def _cut(row: Sequence[int], stop_ids: Sequence[int]) -> Answer:
    for position, token in enumerate(row):
        if token in stop_ids:
            return Answer(tuple(row[:position]), True)
    return Answer(tuple(row), False)
