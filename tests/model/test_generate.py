"""Answers in batches are the answers to each prompt alone, whatever the model carries along."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tandem.model.generate import Answer, generate_answers

from ..invariants.families import PADDED, RECURRENT_GEMMA, TREES, Family

PROMPTS = ([5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30])
LENGTH = 12
FAMILIES: dict[str, Family] = {
    **{name: TREES[name] for name in ("llama", "mistral", "gemma2")},
    **{name: family for name, (family, _) in PADDED.items()},
    "recurrent-gemma": RECURRENT_GEMMA,
}


def _answers(model: object, prompts: Sequence[Sequence[int]]) -> list[Answer]:
    return generate_answers(
        model, prompts, stop_ids=[2], max_new_tokens=LENGTH, temperature=0.0, top_p=1.0, seed=0,
        advance=lambda _: None,
    )  # fmt: skip


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
