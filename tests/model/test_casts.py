"""Under autocast, frozen weights are used as they are: no step casts one to another format."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.data.batching.collate import collate
from tandem.model.attention.select import choose_backend
from tandem.model.logprobs.sequence_logps import sequence_logps
from tandem.model.lora.adapter import LoraWeights
from tandem.model.lora.forward import switch_dropout_off
from tandem.model.lora.targets import unreached_layers
from tandem.model.quantize import quantize
from tandem.recipe.training_settings import LoraSettings

from ..invariants.families import TREES
from ..invariants.made import adapt, attend, make_trees

BF16 = torch.bfloat16


class Casts(TorchDispatchMode):
    """Counts conversions between number formats: by shape, and those of given weights by name."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights = weights
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        source = args[0] if args else None
        if func is torch.ops.aten._to_copy.default and out.dtype != source.dtype:
            self.shapes[tuple(source.shape)] += 1
            name = self.weights.get(source.untyped_storage().data_ptr())
            self.names.update([] if name is None else [name])
        return out


def bfloat16_model(family: str, *, quantized: bool = False) -> Any:
    """A bfloat16 base with a float32 adapter."""
    base = TREES[family].make(BF16)
    out_of_reach = unreached_layers(base)
    switch_dropout_off(base)
    if quantized:
        quantize(base, source=BF16, compute=BF16, device=torch.device("cpu"), kept=out_of_reach)
    attend(base, choose_backend("auto", base)[0])
    model = adapt(base, unreached=out_of_reach)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def casts(model: Any, *, backward: bool = True) -> Casts:
    """What a micro-batch casts; weights are the frozen ones, without the vectors of norms."""
    batch = collate(make_trees())
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad and p.dim() > 1}
    spy = Casts({p.untyped_storage().data_ptr(): n for n, p in frozen.items()})
    with spy:
        with torch.autocast("cpu", BF16):
            loss = sequence_logps(model, batch).sum()
        if backward:
            loss.backward()
    return spy


@pytest.mark.parametrize("quantized", [False, True], ids=["whole", "nf4"])
@pytest.mark.parametrize("family", TREES)
def test_no_frozen_weight_is_cast(family: str, quantized: bool) -> None:
    model = bfloat16_model(family, quantized=quantized)
    assert not casts(model).names
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_float32_weights_would_be_noticed() -> None:
    model = bfloat16_model("llama")
    model.get_base_model().model.layers[0].self_attn.float()
    assert len(casts(model).names) == 4


@pytest.mark.parametrize("quantized", [False, True], ids=["whole", "nf4"])
def test_an_adapter_adds_no_casts_of_activations(quantized: bool) -> None:
    model = bfloat16_model("llama", quantized=quantized)
    with LoraWeights(LoraSettings()).reference(model):
        plain = casts(model, backward=False).shapes
    adapted = casts(model, backward=False).shapes
    extra = {shape: count for shape, count in (adapted - plain).items() if len(shape) == 3}
    assert not extra
