"""A model that is read layer by layer is the model that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tandem.model import load_model as load_model_module
from tandem.model.cpu.stored_weights import KEPT, is_stored
from tandem.model.load_model import load_model
from tandem.model.read_model import fill_layer, read_in_layers, read_model
from tandem.model.unwrap import layers_of

from ..stages.made_inputs import make_model_folder
from ..stages.test_merged_families import ALL, ON_THE_HUB, config_of, gemma_with_vision, make_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family in bfloat16, with the names that its files have on the Hub."""
    root = tmp_path_factory.mktemp("bases")
    made = {
        name: make_base(root / name.replace(" ", "-"), config_of(name), ON_THE_HUB.get(name))
        for name in ALL
    }
    made["gemma with vision"] = make_base(root / "vision", gemma_with_vision())
    for folder in made.values():
        file = folder / "model.safetensors"
        weights = {name: weight.bfloat16() for name, weight in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    return made


def tensors(model: Any) -> dict[str, Tensor]:
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers()))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(3, 24)[None], use_cache=False).logits
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


def _logits_and_gradient(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of some tokens, and the gradient of what is added to their embeddings."""
    model.requires_grad_(False)
    embedding, ids = model.get_input_embeddings(), torch.arange(3, 24)[None]
    added = torch.zeros(1, ids.shape[1], embedding.weight.shape[1], requires_grad=True)
    handle = embedding.register_forward_hook(lambda _, __, out: out + added)
    logits = model(input_ids=ids, use_cache=False).logits
    logits.square().sum().backward()
    handle.remove()
    assert added.grad is not None
    return logits.detach(), added.grad


def test_narrow_weights_give_the_bits_of_float32_ones(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Families in which weights would be narrower elsewhere, too, are loaded as float32."""
    seen = set()
    for name, folder in bases.items():
        found = []
        for share in (0.0, 1.0):
            monkeypatch.setattr(load_model_module, "_COMFORTABLE", share)
            model = load_model(folder, dtype=torch.float32)
            kept = model.config.model_type in KEPT
            assert is_stored(model) is (share == 0 and kept), name
            if not kept:
                break
            seen.add(model.config.model_type)
            found.append(_logits_and_gradient(model))
        for narrow, wide in zip(*found, strict=True) if found else ():
            assert narrow.dtype == wide.dtype == torch.float32, name
            assert torch.equal(narrow, wide), name
    assert seen == KEPT


def test_layers_are_in_memory_only_while_they_run(bases: dict[str, Path]) -> None:
    for name, folder in bases.items():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ours = read_in_layers(folder, theirs.config, dtype=torch.float32)
        # One number stands for a layer's weights.
        for layer in layers_of(ours):
            assert all(p.untyped_storage().nbytes() == 4 for p in layer.parameters()), name
        expected = logits(theirs)
        for _ in range(2):
            assert torch.equal(logits(ours), expected), name
        for layer in layers_of(ours):
            assert all(p.untyped_storage().nbytes() == 4 for p in layer.parameters()), name
            fill_layer(ours, layer)
            assert all(p.isfinite().all() for p in layer.parameters()), name
        assert torch.equal(logits(ours), expected), name


def test_a_layers_weights_go_when_it_fails(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model")
    model = read_in_layers(
        folder, AutoModelForCausalLM.from_pretrained(folder).config, dtype=torch.float32
    )
    (layer, *_) = layers_of(model)
    with pytest.raises(RuntimeError, match="must match the size"):
        layer(torch.zeros(1, 2, 3))
    assert all(p.untyped_storage().nbytes() == 4 for p in layer.parameters())


def test_weights_go_to_their_device_one_after_the_other(tmp_path: Path) -> None:
    """The meta device stands for a card: nothing of what was put there is on the CPU."""
    folder = make_model_folder(tmp_path / "model")
    config = AutoModelForCausalLM.from_pretrained(folder).config
    there: list[int] = []

    def filled(model: Any, _: Any) -> None:
        on_host = {p.untyped_storage().data_ptr(): p for p in model.parameters()}
        numbers = [p.untyped_storage().nbytes() for p in on_host.values() if p.device == CPU]
        there.append(sum(numbers))

    meta = torch.device("meta")
    model = read_model(folder, config, dtype=torch.bfloat16, device=meta, filled=filled)
    assert {p.device for p in model.parameters()} == {meta}
    assert max(there) == 0
