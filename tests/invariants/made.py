"""Tiny models and records for the invariants, and the oracle: padded, dense, full logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tandem.data.encoded.example import Branch, Example
from tandem.data.records import Origin
from tandem.model.lora.adapter import LoraWeights
from tandem.model.prepare_model import (
    FOR_SCORING,
    Preparation,
    prepare_model,
    recompute_activations,
    speed_up_adapter,
)
from tandem.recipe.training_settings import LoraSettings

VOCABULARY = 97


def make_tree(
    rng: np.random.Generator, prefix: int, branches: Sequence[int], shared: int
) -> Example:
    """A tree of random tokens; the last `shared` tokens of the prefix are targets."""

    def ids(count: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, count).astype(np.int32)

    trained = np.zeros(prefix, dtype=bool)
    trained[prefix - shared :] = shared > 0
    return Example(
        Branch(ids(prefix), trained),
        tuple(Branch(ids(n), np.ones(n, dtype=bool)) for n in branches),
        Origin("made", 1),
    )


def make_trees(seed: int = 0) -> list[Example]:
    """Pairs of many shapes: one-token answers, shared answer tokens, long and short prompts."""
    rng = np.random.default_rng(seed)
    shapes = [(20, (5, 9), 3), (7, (1, 12), 0), (30, (15, 3), 2), (4, (1, 1), 0), (12, (8, 8), 1)]
    return [make_tree(rng, *shape) for shape in shapes]


def without_sharing(tree: Example) -> list[Example]:
    """One tree a branch, its prefix repeated: the same sequences with nothing shared."""
    empty = Branch(tree.prefix.input_ids[:0], tree.prefix.trained[:0])
    return [
        Example(empty, (tree.sequence(branch),), tree.origin)
        for branch in range(len(tree.branches))
    ]


def double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' norms keep float64, which they otherwise pass through float32."""
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(modeling_mistral.MistralRMSNorm, "forward", forward)


def make_model(*, window: int | None = None, dtype: torch.dtype = torch.float64) -> Any:
    """A random Mistral-architecture model with grouped queries."""
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=window,
    )
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype)


def attend(model: Any, backend: str) -> None:
    """Let a model attend as a run does, and skip rows that nothing reads."""
    prepare_model(model, FOR_SCORING, Preparation(attention=backend))


def recompute(model: Any) -> None:
    """Let a model recompute its activations."""
    prepare_model(model, (recompute_activations,), Preparation(recomputed=True))


def adapt(model: Any, *, dropout: float = 0.0, unreached: Sequence[str] = ()) -> Any:
    """Wrap a model with an adapter whose B is not zero."""
    lora = LoraSettings(rank=4, alpha=8, dropout=dropout)
    weights = LoraWeights(lora, seed=1, base="made", dropout=dropout > 0)
    wrapped = weights.attach(model, unreached=unreached)
    prepare_model(wrapped, (speed_up_adapter,), Preparation())
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(next(model.parameters()).dtype)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return wrapped


def oracle_logps(model: Any, trees: Sequence[Example]) -> Tensor:
    """Sequence log-probs one sequence at a time through full logits [S]."""
    found = []
    for tree in trees:
        for branch in range(len(tree.branches)):
            sequence = tree.sequence(branch)
            ids = torch.from_numpy(sequence.input_ids.astype(np.int64))[None]
            logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            picked = logps[:-1].gather(1, ids[0, 1:, None])[:, 0]
            found.append(picked[torch.from_numpy(sequence.trained[1:])].sum())
    return torch.stack(found)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's gradients by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def largest_relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """max over tensors of norm(a - b) / norm(b)."""
    assert found.keys() == wanted.keys()
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted)
