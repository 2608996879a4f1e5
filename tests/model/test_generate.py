"""Answers in batches are the answers to each prompt alone, whatever the model carries along."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tandem.model.generate import (
    GeneratedAnswer,
    Sampling,
    choose_tokens,
    generate_answers,
    plan_batches,
)

from ..invariants.families import PADDED, RECURRENT_GEMMA, TREES, Family

PROMPTS = ([5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30])
LENGTH = 12
FAMILIES: dict[str, Family] = {
    **{
        name: TREES[name]
        for name in (
            "llama",
            "mistral",
            "gemma2",
            "gemma3",
            "cohere2",
            "gpt2",
            "opt",
            "gpt-neox",
            "deepseek-v3",
            "qwen3-moe",
        )
    },
    **{name: family for name, (family, _) in PADDED.items()},
    "recurrent-gemma": RECURRENT_GEMMA,
}


def _answers(
    model: object,
    prompts: Sequence[Sequence[int]],
    temperature: float = 0.0,
    seed: int = 0,
    stops: Sequence[int] = (2,),
) -> list[GeneratedAnswer]:
    sampling = Sampling(LENGTH, temperature, top_p=0.9, seed=seed)
    return generate_answers(model, prompts, stop_ids=stops, sampling=sampling)


@pytest.mark.parametrize("family", FAMILIES)
def test_company_does_not_change_an_answer(family: str) -> None:
    model = FAMILIES[family].make(torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # small random weights would say the same to every prompt
            parameter.data *= 3
    together = _answers(model, PROMPTS)
    assert together == [_answers(model, [prompt])[0] for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for token in answer.ids:
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                assert logits[token] >= logits.max() - 1e-4
                ids.append(token)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_that_changes_nothing_answers_as_its_base(family: str) -> None:
    """A wrapped model's own signature says nothing of positions, which left padding moves."""
    from peft import LoraConfig, get_peft_model

    model = FAMILIES[family].make(torch.float64)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 3
    expected = _answers(model, PROMPTS)
    computed: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda _module, _given, logits: computed.append(logits.shape[1])
    )
    # GPT-2's layers hold their weights the other way round.
    config = LoraConfig(target_modules="all-linear", r=2, fan_in_fan_out=family == "gpt2")
    adapter = get_peft_model(model, config).eval()
    assert _answers(adapter, PROMPTS) == expected
    assert [_answers(adapter, [prompt])[0] for prompt in PROMPTS] == expected
    assert set(computed) == {1}  # logits of the last position alone


@pytest.mark.parametrize("family", ["llama", "mistral", "mamba"])
def test_company_does_not_change_a_sampled_answer(family: str) -> None:
    """Rows that end leave the batch; what the others say follows from their own numbers."""
    model = FAMILIES[family].make(torch.float64)
    sampled: Any = {"temperature": 1.5, "stops": tuple(range(2, 8))}  # many answers end
    count = 8 if family == "mamba" else 40  # mamba answers one row after the other
    prompts = [[50 + i % 40, 6 + i % 7, *range(5, 5 + i % 9)] for i in range(count)]
    together = _answers(model, prompts, **sampled)
    assert together == _answers(model, prompts, **sampled)
    assert together != _answers(model, prompts, **sampled, seed=1)
    ended = [len(answer.ids) for answer in together if answer.stopped]
    assert count / 4 < len(ended) < count
    assert len(set(ended)) > count / 20 + 1
    # The first half alone keeps its places, hence its numbers, in other batches.
    assert _answers(model, prompts[:3], **sampled) == together[:3]
    assert _answers(model, prompts[: count // 2], **sampled) == together[: count // 2]


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 5), (0.8, 6), (0.01, 0)])
def test_tokens_are_chosen_with_the_probabilities_that_transformers_gives(
    top_p: float, top_k: int
) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    logits = torch.randn(1, 30) * 2
    scores = TemperatureLogitsWarper(0.7)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0]
    # A fine comb of numbers instead of random ones: shares are then exact to one tooth.
    count = 20_000
    comb = (torch.arange(count) + 0.5) / count
    chosen = choose_tokens(logits.expand(count, -1), comb, Sampling(1, 0.7, top_p, top_k))
    shares = chosen.bincount(minlength=30) / count
    torch.testing.assert_close(shares, expected, rtol=0, atol=3 / count)


def test_no_number_picks_a_token_without_probability() -> None:
    logits = torch.tensor([[0.0, 5.0, -1.0, 4.0]]).expand(3, -1)
    edge = torch.tensor([0.0, 1 - 2**-24, 1 - 2**-23])
    assert choose_tokens(logits, edge, Sampling(1, 1.0, 0.9)).tolist() == [1, 3, 3]
    never = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(3, -1)
    assert choose_tokens(never, edge, Sampling(1, 1.0)).tolist() == [1, 2, 2]
    assert choose_tokens(logits, None, Sampling(1)).tolist() == [1, 1, 1]


def test_batches_are_planned_from_lengths_alone() -> None:
    model = FAMILIES["llama"].make()
    lengths = [(7 * i) % 90 + 1 for i in range(200)]
    batches = plan_batches(model, lengths, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(200))
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(in_order)
    assert [len(batch) for batch in batches] == [64, 64, 64, 8]
    # A long row takes the place of many short ones.
    assert [len(batch) for batch in plan_batches(model, [8000] * 5, 192)] == [2, 2, 1]
    assert [len(b) for b in plan_batches(FAMILIES["mamba"].make(), [3, 1, 2], 9)] == [1, 1, 1]


def test_a_model_that_gives_no_cache_is_read_from_the_start_each_time() -> None:
    model = FAMILIES["llama"].make(torch.float64)
    expected = _answers(model, PROMPTS, temperature=1.0)
    forward = model.forward

    def forgetful(*args: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        output = forward(*args, input_ids=input_ids, **options | {"past_key_values": None})
        output.past_key_values = None
        return output

    model.forward = forgetful
    model.generation_config.use_cache = False
    assert _answers(model, PROMPTS, temperature=1.0) == expected
