"""Model families over packed trees: log-probs and gradients of plain transformers, in float64."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tandem.data.batching.collate import collate
from tandem.model.attention.backend import BACKENDS
from tandem.model.attention.select import choose_backend
from tandem.model.load_model import load_model
from tandem.model.logprobs.sequence_logps import sequence_logps
from tandem.model.lora.targets import unreached_layers

from .families import TREES
from .made import (
    adapt,
    attend,
    gradients,
    largest_relative_error,
    make_trees,
    oracle_logps,
    recompute,
)
from .precision import everything_in_float64


@pytest.fixture
def layers_seen(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each attention layer went through one of tandem's backends."""
    seen: Counter[int] = Counter()
    for name, function in BACKENDS.items():

        def spy(module: Any, *arguments: Any, _f: Any = function, **keywords: Any) -> Any:
            seen[id(module)] += 1
            return _f(module, *arguments, **keywords)

        monkeypatch.setitem(BACKENDS, name, spy)
    return seen


@pytest.mark.parametrize("family", TREES)
def test_the_tree_path_equals_plain_transformers(family: str, layers_seen: Counter[int]) -> None:
    made = TREES[family]
    trees = make_trees()
    with everything_in_float64():
        left_out = unreached_layers(made.make())
        assert bool(left_out) == (family == "phimoe")
        reference = adapt(made.make(), unreached=left_out)
        wanted = oracle_logps(reference, trees)
        weights = torch.randn(len(wanted), generator=torch.manual_seed(2))
        (wanted * weights).sum().backward()

        plain = made.make()
        assert choose_backend("auto", plain)[0] == made.backend
        attend(plain, made.backend)
        model = adapt(plain, unreached=left_out)
        layers_seen.clear()
        found = sequence_logps(model, collate(trees))
        (found * weights).sum().backward()

    assert found.dtype == wanted.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    expected = gradients(reference)
    assert len(expected) >= 2 * 2 * plain.config.num_hidden_layers
    assert largest_relative_error(gradients(model), expected) < 1e-9
    # The tree path is what ran, once in every layer.
    assert list(layers_seen.values()) == [1] * plain.config.num_hidden_layers


@pytest.mark.parametrize("family", TREES)
def test_a_model_as_it_is_loaded_equals_plain_transformers(family: str, tmp_path: Path) -> None:
    """In float32, where the kernels and oneDNN's products take over what they can."""
    made, trees = TREES[family], make_trees()
    plain = made.make(torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "norm" in name:  # they begin as ones or zeros, which hides what becomes of them
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    plain.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = oracle_logps(plain, trees)
        model = load_model(tmp_path, dtype=torch.float32).requires_grad_(False)
        attend(model, made.backend)
        found = sequence_logps(model, collate(trees))
    torch.testing.assert_close(found.float(), wanted.float(), rtol=1e-4, atol=1e-4)


# One of each way to build a layer: other families differ in what its parts compute.
@pytest.mark.parametrize(
    "family",
    ["llama", "gemma2", "gemma3", "gpt2", "gpt-neox", "opt", "deepseek-v3", "phimoe", "mixtral"],
)
def test_checkpointing_changes_nothing(family: str, layers_seen: Counter[int]) -> None:
    results = []
    for checkpointing in (False, True):
        plain = TREES[family].make()
        left_out = unreached_layers(plain)
        attend(plain, TREES[family].backend)
        model = adapt(plain, unreached=left_out)
        if checkpointing:
            recompute(model)
        model.train()
        layers_seen.clear()
        logps = sequence_logps(model, collate(make_trees()))
        (logps * torch.arange(1.0, 1.0 + len(logps))).sum().backward()
        # Each layer was computed once more, through tandem's attention again.
        times = 2 if checkpointing else 1
        assert list(layers_seen.values()) == [times] * plain.config.num_hidden_layers
        results.append((logps, gradients(model)))
    (kept, wanted), (recomputed, found) = results
    assert torch.equal(kept, recomputed)
    assert largest_relative_error(found, wanted) < 1e-12
