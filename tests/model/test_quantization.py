"""A base in 4 bits: what is rounded, what is computed with it, and what it never does."""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tandem.data.batching.collate import collate
from tandem.errors import UserError
from tandem.model import quantize as quantization
from tandem.model.attention.select import choose_backend
from tandem.model.cpu.onednn_linear import order_weights
from tandem.model.logprobs.sequence_logps import sequence_logps
from tandem.model.lora.adapter import LoraWeights
from tandem.model.lora.forward import switch_dropout_off
from tandem.model.lora.targets import unreached_layers
from tandem.model.quantize import dequantized, quantize, quantized_of, read_record
from tandem.model.trained_weights import trainable_parameters
from tandem.recipe.training_settings import LoraSettings

from ..invariants.families import PADDED, TREES
from ..invariants.made import (
    adapt,
    attend,
    gradients,
    largest_relative_error,
    make_model,
    make_trees,
    oracle_logps,
)

CPU = torch.device("cpu")
FAMILIES = TREES | {name: PADDED[name][0] for name in ("mamba", "jamba", "stablelm", "lfm2")}


def quantized(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model, in 4 bits, and a copy of it whose weights are what these round to."""
    quantize(model, source=dtype, compute=dtype, device=CPU, kept=unreached_layers(model))
    return model


def plain_twin(model: Any, make: Any) -> Any:
    """A plain model with the weights that a quantised one multiplies with."""
    twin = make()
    record = quantized_of(model)
    assert record is not None
    for name in record.weights:
        weight = dequantized(model.get_submodule(name.removesuffix(".weight")))
        own = twin.get_parameter(name)
        own.data = (weight.T if name in record.transposed else weight).to(own.dtype)
    return twin


def score(model: Any, trees: Any) -> Tensor:
    return sequence_logps(model, collate(trees))


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_a_plain_model_with_the_rounded_weights(family: str) -> None:
    def make() -> Any:
        return FAMILIES[family].make(torch.float32)

    model = quantized(make())
    record = quantized_of(model)
    assert record is not None
    assert model.get_output_embeddings().weight.dtype == torch.float32
    twin = plain_twin(model, make)
    whole = make()
    out_of_reach = unreached_layers(whole)
    assert not {name + ".weight" for name in out_of_reach} & set(record.weights)
    adapted = {}
    trees = make_trees()
    for name, one in (("4 bits", model), ("plain", twin), ("whole", whole)):
        attend(one, choose_backend("auto", one)[0])
        switch_dropout_off(one)
        adapted[name] = adapt(one, unreached=out_of_reach)
    order_weights(adapted["4 bits"])
    found, wanted, unrounded = (score(one, trees) for one in adapted.values())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    # Rounding to 4 bits is seen, so a model that stayed whole could not pass for a quantised one.
    error, rounding = (float((a - wanted).detach().abs().max()) for a in (found, unrounded))
    assert rounding > 20 * error
    found.sum().backward()
    wanted.sum().backward()
    a, b = gradients(adapted["4 bits"]), gradients(adapted["plain"])
    assert len(b) >= 4
    assert largest_relative_error(a, b) < 1e-4


def test_equals_full_logits_of_one_sequence_at_a_time() -> None:
    def make() -> Any:
        return make_model(dtype=torch.float32)

    model = quantized(make())
    twin = adapt(plain_twin(model, make)).double()
    wanted = oracle_logps(twin, make_trees())
    attend(model, "segments")
    model = adapt(model)
    found = score(model, make_trees())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found.sum().backward()
    wanted.sum().backward()
    assert largest_relative_error(gradients(model), gradients(twin)) < 1e-4


def test_the_reference_is_the_quantised_base_bit_for_bit() -> None:
    model = adapt(quantized(make_model(dtype=torch.float32)))
    attend(model.get_base_model(), "segments")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    model.train()
    policy = score(model, make_trees())
    with LoraWeights(LoraSettings()).reference(model), torch.no_grad():
        reference = score(model, make_trees())
    assert torch.equal(policy.detach(), reference)
    # Scoring without gradients has left the layers as they were.
    again = score(model, make_trees())
    assert torch.equal(again, policy)
    again.sum().backward()
    assert all(gradients(model)[n].abs().max() > 0 for n in gradients(model) if "lora_B" in n)


def test_dropout_follows_the_record() -> None:
    from tandem.data.batching.collate import record_key

    model = adapt(quantized(make_model(dtype=torch.float32)), dropout=0.3).train()
    attend(model.get_base_model(), "segments")
    trees = make_trees()
    keys = [record_key(1, 0, i) for i in range(len(trees))]
    together = sequence_logps(model, collate(trees, keys))
    alone = torch.cat(
        [sequence_logps(model, collate([t], [k])) for t, k in zip(trees, keys, strict=True)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    model.eval()
    assert float((score(model, trees) - together).detach().abs().max()) > 1e-3


def resident(model: nn.Module) -> int:
    """Bytes of a model's parameters, scales of 4-bit ones included."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            for one in (state, state.state2):  # the second one's are the scales' own
                total += one.absmax.nbytes + one.code.nbytes
    return total


def test_weights_take_little_more_than_half_a_byte() -> None:
    from transformers import AutoModelForCausalLM, MistralConfig

    config = MistralConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=3584, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    layers = model.get_decoder().layers
    before = resident(layers)
    numbers = sum(p.numel() for p in layers.parameters())
    assert before == 2 * numbers
    quantize(model, source=torch.bfloat16, compute=torch.bfloat16, device=CPU)
    # Half a byte, a byte a block of 64 and four a block of 256 of those; norms stay as they are.
    assert 0.515 < resident(layers) / numbers < 0.53


def test_the_record_goes_with_the_adapter(tmp_path: Path) -> None:
    model = adapt(quantized(make_model(dtype=torch.float32)))
    LoraWeights(LoraSettings()).save(model, tmp_path, trainable_parameters(model))
    assert read_record(tmp_path) == quantized_of(model)
    (tmp_path / "quantization.json").write_text('{"format": "int3"}')
    with pytest.raises(UserError, match=r"quantization\.json cannot be used"):
        read_record(tmp_path)
    (tmp_path / "quantization.json").unlink()
    plain = adapt(make_model(dtype=torch.float32))
    LoraWeights(LoraSettings()).save(plain, tmp_path, trainable_parameters(plain))
    assert read_record(tmp_path) is None


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    with pytest.raises(UserError, match=r"pip install '\.\[quant\]'"):
        quantized(make_model(dtype=torch.float32))
    with pytest.raises(UserError, match="bitsandbytes, which is not installed"):
        quantization.check_quantization("nf4", device="cpu", sharded=False)


@pytest.mark.parametrize(
    ("device", "sharded", "message"),
    [("hpu", False, "not supported on hpu"), ("cuda", True, "engine that shards the base")],
)
def test_what_cannot_be_quantised_is_refused(device: str, sharded: bool, message: str) -> None:
    quantization.check_quantization(None, device=device, sharded=sharded)
    quantization.check_quantization("nf4", device="cpu", sharded=False)
    with pytest.raises(UserError, match=message):
        quantization.check_quantization("nf4", device=device, sharded=sharded)


def test_nothing_to_quantise_is_refused() -> None:
    model = copy.deepcopy(make_model(dtype=torch.float32))
    model.model.layers = nn.ModuleList()
    with pytest.raises(UserError, match="no linear layers"):
        quantize(model, source=torch.float32, compute=torch.float32, device=CPU)


_SPY = """
import socket, sys, types
import torch, transformers.integrations.hub_kernels

def refuse(*args, **kwargs):
    print("CONNECTED", args)
    raise OSError("no network in this test")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
kernels = types.ModuleType("kernels")
kernels.get_kernel = refuse
sys.modules["kernels"] = kernels
import tandem.model.lora.adapter
from tests.invariants.made import adapt, make_model
from tests.model.test_quantization import quantized
adapt(make_model(dtype=torch.float32))
assert "bitsandbytes" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules
model = make_model(dtype=torch.float32)
quantized(model)
adapt(model)
assert sys.modules["kernels"] is kernels
assert "torch._inductor.compile_fx" not in sys.modules
print("done")
"""


def test_nothing_is_fetched_and_nothing_said() -> None:
    """Neither for a whole model nor for one in 4 bits; the compiler is imported for neither."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _SPY],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.stderr == ""
