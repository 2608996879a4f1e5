"""A model that is read layer by layer is the model that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tandem.model.read_model import fill_layer, read_in_layers, read_model
from tandem.model.unwrap import layers_of

from ..stages.made_inputs import make_model_folder
from ..stages.test_merged_families import ALL, ON_THE_HUB, config_of, gemma_with_vision, make_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each family, with the names that its files have on the Hub."""
    root = tmp_path_factory.mktemp("bases")
    made = {
        name: make_base(root / name.replace(" ", "-"), config_of(name), ON_THE_HUB.get(name))
        for name in ALL
    }
    return {**made, "gemma with vision": make_base(root / "vision", gemma_with_vision())}


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers()))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 24)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_familys_weights_and_buffers_are_transformers_own(
    dtype: torch.dtype, bases: dict[str, Path]
) -> None:
    for name, folder in bases.items():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        ours = read_model(folder, theirs.config, dtype=dtype, device=CPU)
        expected, found = tensors(theirs), tensors(ours)
        assert expected.keys() == found.keys(), name
        for key, tensor in expected.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), (name, key)
            assert torch.equal(found[key], tensor), (name, key)
        tied = [
            [id(p) for p in dict(model.named_parameters(remove_duplicate=False)).values()]
            for model in (theirs, ours)
        ]
        assert [ids.index(i) for ids in tied[:1] for i in ids] == [
            ids.index(i) for ids in tied[1:] for i in ids
        ], name
        assert not ours.training
        assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id


def test_layers_are_in_memory_only_while_they_run(bases: dict[str, Path]) -> None:
    for name, folder in bases.items():
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        ours = read_in_layers(folder, theirs.config, dtype=torch.float32)
        # One number stands for a layer's weights.
        for layer in layers_of(ours):
            assert all(p.untyped_storage().nbytes() == 4 for p in layer.parameters()), name
        for _ in range(2):
            assert torch.equal(logits(ours), logits(theirs)), name
        for layer in layers_of(ours):
            assert all(p.untyped_storage().nbytes() == 4 for p in layer.parameters()), name
            fill_layer(ours, layer)
            assert all(p.isfinite().all() for p in layer.parameters()), name
        assert torch.equal(logits(ours), logits(theirs)), name


def test_a_layers_weights_go_when_it_fails(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    model = read_in_layers(
        folder, AutoModelForCausalLM.from_pretrained(folder).config, dtype=torch.float32
    )
    (layer, *_) = layers_of(model)
    with pytest.raises(RuntimeError, match="must match the size"):
        layer(torch.zeros(1, 2, 3))
    assert all(p.untyped_storage().nbytes() == 4 for p in layer.parameters())
