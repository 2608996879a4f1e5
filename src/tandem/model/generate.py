"""Answers from a model: prompts of similar length together, each with random numbers of its own.

What a row samples follows from its own seed and number, never from the rows beside it; a batch
changes an answer only as far as it changes the rounding of logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tandem.model.unwrap import plain_model
from tandem.storage.hashing import hash_json

# Prompt and answer tokens of one batch, which bounds the KV cache.
_BATCH_TOKENS = 16384
_BATCH_ROWS = 64
# Rows that have ended leave the batch when they are this share of it.
_ENDED_SHARE = 0.125


@dataclass(frozen=True)
class GeneratedAnswer:
    """Generated token ids without the end token, and whether the model ended by itself."""

    ids: tuple[int, ...]
    stopped: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int
    temperature: float = 0.0  # 0 takes the likeliest token
    top_p: float = 1.0  # share of the probability mass sampled from, the likeliest tokens first
    top_k: int = 0  # how many of the likeliest tokens are sampled from; 0: all
    seed: int = 0  # of the random numbers; each prompt has its own


def generate_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    sampling: Sampling,
    advance: Callable[[int], None] = lambda _: None,
) -> list[GeneratedAnswer]:
    """Answer each prompt (token ids), in the prompts' order; see `generate_batch`.

    The model is in evaluation mode and attends by transformers' own attention. `stop_ids` end an
    answer; `advance` is told how many more answers there are.
    """
    answers: dict[int, GeneratedAnswer] = {}
    lengths = [len(prompt) for prompt in prompts]
    for members in plan_batches(model, lengths, sampling.max_new_tokens):
        batch = generate_batch(
            model, [prompts[i] for i in members], members, stop_ids=stop_ids, sampling=sampling
        )
        answers.update(zip(members, batch, strict=True))
        advance(len(members))
    return [answers[i] for i in range(len(prompts))]


def plan_batches(model: Any, lengths: Sequence[int], max_new_tokens: int) -> list[list[int]]:
    """Which prompts are asked together, by their lengths in tokens alone; shortest first.

    Models that keep state across tokens answer one prompt at a time: padding, or another prompt,
    may leak into their state.
    """
    rows = 1 if _keeps_state(model) else _BATCH_ROWS
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Prompts come shortest first, so the newest is the batch's longest.
        length = lengths[index] + max_new_tokens
        full = not batches or len(batches[-1]) >= rows
        if full or (len(batches[-1]) + 1) * length > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    stop_ids: Sequence[int],
    sampling: Sampling,
) -> list[GeneratedAnswer]:
    """Answer prompts together, padded on the left; `numbers` and the seed decide what is drawn."""
    uniforms = _uniforms(numbers, sampling) if sampling.temperature > 0 else None
    decode = _by_transformers if _keeps_state(model) else _decode
    # No inference mode: a later training could meet tensors that the model has cached.
    with torch.no_grad():
        return decode(model, prompts, uniforms, list(stop_ids), sampling)


def choose_tokens(
    logits_RV: torch.Tensor,  # noqa: N803 - R rows, V entries of the vocabulary
    uniforms_R: torch.Tensor | None,  # noqa: N803
    sampling: Sampling,
) -> torch.Tensor:
    """The next token of each row [R] int64, from its logits [R, V] and a number in [0, 1) [R].

    The number picks from the cumulated probabilities, of the tokens that top_k and top_p leave.
    Without numbers it is the likeliest token.
    """
    if uniforms_R is None:
        return logits_RV.argmax(dim=-1)
    probs = (logits_RV.float() / sampling.temperature).softmax(dim=-1)
    order = None
    if sampling.top_p < 1 or 0 < sampling.top_k < probs.shape[-1]:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        if sampling.top_k:
            probs[:, sampling.top_k :] = 0.0
            probs = probs / probs.sum(dim=-1, keepdim=True)
        # A token stays while those before it sum to less than top_p.
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= sampling.top_p, 0.0)
    cumulated = probs.cumsum(dim=-1)
    total = cumulated[:, -1:]
    wanted = uniforms_R.to(total.device)[:, None] * total
    # Rounding must not carry it past the last token that has any probability.
    wanted = wanted.minimum(torch.nextafter(total, torch.zeros_like(total)))
    picked = (cumulated <= wanted).sum(dim=-1, keepdim=True)
    return (picked if order is None else order.gather(-1, picked))[:, 0]


def _keeps_state(model: Any) -> bool:
    return bool(getattr(model, "_is_stateful", False))


def _uniforms(numbers: Sequence[int], sampling: Sampling) -> torch.Tensor:
    """Random numbers [R, max_new_tokens] in [0, 1), each row's from its own generator."""
    seeds = (int(hash_json([sampling.seed, number])[:15], 16) for number in numbers)
    own = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.stack([torch.rand(sampling.max_new_tokens, generator=one) for one in own])


def _padded(
    prompts: Sequence[Sequence[int]], padding: int, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [R, T], padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), padding, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniforms: torch.Tensor | None,
    stops: Sequence[int],
    sampling: Sampling,
) -> list[GeneratedAnswer]:
    """Token by token with a KV cache; rows that have ended leave the batch."""
    # An adapter's wrapper accepts any arguments.
    accepted = inspect.signature(plain_model(model).forward).parameters
    ids, mask = _padded(prompts, stops[0] if stops else 0, model.device)
    cache: Any = None  # the model makes its own kind
    endings = torch.tensor(stops, dtype=torch.int64, device=model.device)
    written: list[list[int]] = [[] for _ in prompts]
    stopped = [False] * len(prompts)
    active = list(range(len(prompts)))
    for step in range(sampling.max_new_tokens):
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in accepted:
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -ids.shape[1] :]
        if "logits_to_keep" in accepted:
            inputs["logits_to_keep"] = 1
        output = model(**inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        if cache is None:  # it gives none, and one token alone would say nothing of the others
            return _by_transformers(model, prompts, uniforms, stops, sampling)
        drawn = None if uniforms is None else uniforms[active, step]
        tokens = choose_tokens(output.logits[:, -1], drawn, sampling)
        ended = torch.isin(tokens, endings).tolist()
        for row, token, end in zip(active, tokens.tolist(), ended, strict=True):
            if not stopped[row] and not end:
                written[row].append(token)
            stopped[row] |= end
        over = [stopped[row] for row in active]
        if all(over):
            break
        ids, mask = tokens[:, None], torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        if sum(over) >= _ENDED_SHARE * len(active):
            kept = [place for place, row in enumerate(active) if not stopped[row]]
            places = torch.tensor(kept, device=ids.device)
            cache.batch_select_indices(places)
            ids, mask, active = ids[places], mask[places], [active[place] for place in kept]
    return [GeneratedAnswer(tuple(row), end) for row, end in zip(written, stopped, strict=True)]


def _by_transformers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniforms: torch.Tensor | None,
    stops: Sequence[int],
    sampling: Sampling,
) -> list[GeneratedAnswer]:
    """The same through transformers' generate, which knows what state each model keeps."""
    from transformers import LogitsProcessorList

    padding = stops[0] if stops else 0
    ids, mask = _padded(prompts, padding, model.device)
    length = ids.shape[1]

    def choose(so_far: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        drawn = None if uniforms is None else uniforms[:, so_far.shape[1] - length]
        tokens = choose_tokens(logits, drawn, sampling)
        return torch.full_like(logits, float("-inf")).scatter(1, tokens[:, None], 0.0)

    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(stops) or None, pad_token_id=padding, do_sample=False,
        temperature=None, top_p=None, top_k=None, logits_processor=LogitsProcessorList([choose]),
    )  # fmt: skip
    return [_cut(row, stops) for row in output[:, length:].tolist()]


def _cut(row: Sequence[int], stops: Sequence[int]) -> GeneratedAnswer:
    end = next((place for place, token in enumerate(row) if token in stops), None)
    return GeneratedAnswer(tuple(row[:end]), end is not None)
