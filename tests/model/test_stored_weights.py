"""Weights that stay as they are stored: the same bits as float32 ones, in half the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tandem.errors import UserError
from tandem.model import load_model as module
from tandem.model.cpu import onednn_linear
from tandem.model.cpu.onednn_linear import low_rank_product, product, speed_up_frozen_products
from tandem.model.cpu.stored_weights import KEPT, is_stored, keep_stored, widened
from tandem.model.generate import Sampling, generate_answers
from tandem.model.load_model import load_adapter, load_base, load_model
from tandem.storage.atomic_files import read_json

from ..stages.made_inputs import make_model_folder
from ..stages.test_merged_families import ALL, ON_THE_HUB, config_of, make_base
from ..stages.test_training_stages import run


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose files are narrow."""
    folder = make_model_folder(tmp_path_factory.mktemp("narrow") / "model")
    file = folder / "model.safetensors"
    weights = {name: weight.to(request.param) for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 weights count as too large for this machine's memory."""
    monkeypatch.setattr(module, "_COMFORTABLE", 0.0)


@pytest.mark.parametrize("shape", [(48, 32), (512, 384), (33, 65), (1000, 64)])
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("mkldnn", [True, False])
def test_products_have_the_bits_of_float32_weights(
    shape: tuple[int, int], rows: int, mkldnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn_linear, "_AVAILABLE", mkldnn and onednn_linear._AVAILABLE)
    torch.manual_seed(0)
    weight = torch.randn(shape).to(torch.bfloat16)
    x, d_out = torch.randn(rows, shape[1]), torch.randn(rows, shape[0])
    assert torch.equal(product(x, weight), product(x, weight.float()))
    assert torch.equal(product(d_out, weight.T), product(d_out, weight.float().T))


def test_the_memory_of_a_widened_matrix_is_used_again() -> None:
    first, second = torch.randn(8, 6).bfloat16(), torch.randn(4, 6).bfloat16()
    wide = widened(first)
    assert torch.equal(wide, first.float())
    turned = widened(first.T)
    assert turned.stride() == first.T.stride()
    assert turned.data_ptr() == wide.data_ptr() == widened(second).data_ptr()


def _layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def test_gradients_have_the_bits_of_float32_weights() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 32).bfloat16()
    found = []
    for own in (weight, weight.float()):
        layer = _layer(own)
        model: Any = nn.Sequential(layer)
        if own is weight:
            keep_stored(model)
        speed_up_frozen_products(model)
        torch.manual_seed(1)
        x = torch.randn(9, 32, requires_grad=True)
        down, up = (torch.randn(*size, requires_grad=True) for size in ((4, 32), (48, 4)))
        out = layer(x) + low_rank_product(x, x, layer, down, up, 0.5)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, down.grad, up.grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_training_has_the_bits_of_float32_weights(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And half the memory; the adapter is float32, as it always is."""
    options: dict[str, Any] = {"max_steps": 2}
    kept = run(kind, base, tmp_path / "stored", **options)
    monkeypatch.setattr(module, "_COMFORTABLE", 1.0)
    # Without copies in another order, which would round differently.
    monkeypatch.setattr("tandem.stages.training.execution._COPIES_SHARE", 0.0)
    wide = run(kind, base, tmp_path / "wide", **options)
    assert all(torch.equal(kept[name], wide[name]) for name in wide)
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    summaries = [read_json(tmp_path / name / "manifest.json") for name in ("stored", "wide")]
    assert summaries[0]["inputs"] == summaries[1]["inputs"]


@pytest.mark.usefixtures("narrow")
def test_answers_and_logits_have_the_bits_of_float32_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("sft", base, tmp_path / "adapter", max_steps=1)
    said: list[str] = []
    found = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(module, "_COMFORTABLE", share)
        model = load_base(base, tmp_path / "adapter", dtype=torch.float32, log=said.append)
        assert is_stored(model) is (share == 0)
        dtypes = {name: p.dtype for name, p in model.named_parameters()}
        assert (dtypes["model.layers.0.mlp.up_proj.weight"] == torch.float32) is (share == 1)
        assert dtypes["model.norm.weight"] == torch.float32
        ids = torch.arange(3, 30)[None]
        with torch.no_grad():
            logits = [model(input_ids=ids, use_cache=False).logits]
            adapted = load_adapter(model, tmp_path / "adapter")
            logits.append(adapted(input_ids=ids, use_cache=False).logits)
        sampling = Sampling(max_new_tokens=8)
        answers = generate_answers(adapted, [[5, 6, 7], [8, 9]], stop_ids=[1], sampling=sampling)
        found.append((logits, answers))
    assert all(torch.equal(a, b) for a, b in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1]
    (line,) = said
    assert "as they are stored, and are widened where they are used" in line


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


def test_every_family_has_the_bits_of_float32_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Families in which weights would be narrower elsewhere, too, are loaded as float32."""
    seen = set()
    for name in ALL:
        config = config_of(name)
        folder = make_base(tmp_path / name.replace(" ", "-"), config, ON_THE_HUB.get(name))
        file = folder / "model.safetensors"
        weights = {key: weight.bfloat16() for key, weight in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        found = []
        for share in (0.0, 1.0):
            monkeypatch.setattr(module, "_COMFORTABLE", share)
            model = load_model(folder, dtype=torch.float32)
            assert is_stored(model) is (share == 0 and config.model_type in KEPT), name
            if config.model_type in KEPT:
                found.append(_logits_and_gradient(model))
        for narrow, wide in zip(*found, strict=True) if found else ():
            assert narrow.dtype == wide.dtype == torch.float32, name
            assert torch.equal(narrow, wide), name
        seen.add(config.model_type)
    assert seen >= KEPT


@pytest.mark.usefixtures("narrow")
def test_what_is_stored_in_float32_or_asked_for_narrow_is_loaded_as_ever(
    base: Path, tmp_path: Path
) -> None:
    wide = make_model_folder(tmp_path / "model")
    assert not is_stored(load_model(wide, dtype=torch.float32))
    assert not is_stored(load_model(base, dtype=torch.float64))
    assert not is_stored(load_model(base, dtype=torch.bfloat16))
    assert not is_stored(load_model(base, dtype=torch.float32, may_stay_stored=False))


def test_a_model_that_fits_only_as_it_is_stored_is_loaded_so(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = sum(p.numel() for p in load_model(base, dtype=torch.float32).parameters())
    monkeypatch.setattr("tandem.runtime.device.Device.free_memory", lambda _: numbers * 3)
    assert is_stored(load_model(base, dtype=torch.float32))
    monkeypatch.setattr("tandem.runtime.device.Device.free_memory", lambda _: numbers)
    with pytest.raises(UserError, match=r"float16, and 0\.0 GB of memory"):
        load_model(base, dtype=torch.float32)
