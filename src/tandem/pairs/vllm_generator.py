"""Answers by vLLM, where it is installed: its own batches, its own kernels."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.errors import require
from tandem.model.generate import GeneratedAnswer, Sampling
from tandem.recipe.pairs_settings import VllmSettings


class Vllm:
    """A model folder in vLLM's engine; dtype auto is the model's own. UserError without vLLM."""

    def __init__(self, folder: Path, dtype: str, settings: VllmSettings) -> None:
        require("vllm", "vllm", "pairs.vllm")
        self._library: Any = importlib.import_module("vllm")
        self._engine = self._library.LLM(
            model=str(folder), tokenizer=str(folder), dtype=dtype,
            tensor_parallel_size=settings.tensor_parallel, gpu_memory_utilization=settings.memory,
        )  # fmt: skip

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        *,
        stop_ids: Sequence[int],
        sampling: Sampling,
    ) -> list[GeneratedAnswer]:
        """See `generate_batch`; each request has a seed, but its tokens may depend on the batch."""
        settings = [
            self._library.SamplingParams(
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or -1,
                seed=(sampling.seed * 1_000_003 + number) % 2**63,
                stop_token_ids=list(stop_ids),
                detokenize=False,
            )
            for number in numbers
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = self._engine.generate(asked, settings, use_tqdm=False)
        return [_answer(output.outputs[0], stop_ids) for output in outputs]


def _answer(completion: Any, stop_ids: Sequence[int]) -> GeneratedAnswer:
    ids = list(completion.token_ids)
    # Versions differ in whether the token that ended an answer is among its tokens.
    while ids and ids[-1] in stop_ids:
        ids.pop()
    return GeneratedAnswer(tuple(ids), completion.finish_reason == "stop")
