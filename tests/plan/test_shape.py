"""Sizes and operations from a configuration, against real models and torch's own counter."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    ViTConfig,
)

from tandem.data.tokenize.vocabulary import AddedTokens
from tandem.errors import UserError
from tandem.model.added_tokens import make_rows
from tandem.model.attention.packing_probe import probe_packing
from tandem.model.lora.adapter import LoraWeights
from tandem.model.lora.targets import unreached_layers
from tandem.model.trained_weights import hidden_matrices, trainable_parameters
from tandem.plan.model_shape import ModelShape, described, shape_of
from tandem.plan.stage_estimate import MemoryUse, disk_of, memory_of, state_bytes
from tandem.plan.workload import Workload, count_operations
from tandem.recipe.choices import SHARDS
from tandem.recipe.data_source import DataSource
from tandem.recipe.training_settings import LoraSettings, SftSettings
from tandem.runtime.device import Device
from tandem.train.optimizers import make_optimizer, state_of

from ..invariants.families import PADDED
from ..invariants.made import recompute

_SMALL: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "mistral": MistralConfig(**_SMALL, sliding_window=None),
    "qwen2": Qwen2Config(**_SMALL),
    "gemma2": Gemma2Config(**_SMALL, head_dim=16),
    "gpt2": GPT2Config(vocab_size=90, n_embd=32, n_layer=3, n_head=4),
}


def _shape(config: Any, targets: Any = "all-linear") -> ModelShape:
    return described(
        config, LoraSettings(rank=4, alpha=8, target_modules=targets), attention="auto"
    ).shape


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")])
def test_parameters_are_those_of_the_real_model(name: str, targets: Any) -> None:
    if name == "gpt2" and targets != "all-linear":
        targets = ("c_attn",)
    shape = _shape(CONFIGS[name], targets)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    adapted = LoraWeights(LoraSettings(rank=4, alpha=8, target_modules=targets)).attach(model)
    assert shape.trained == sum(p.numel() for p in trainable_parameters(adapted).values()) > 0
    assert shape_of(adapted) == shape
    head = adapted.get_base_model().get_output_embeddings().weight
    assert shape.head == head.numel()


@pytest.mark.parametrize(
    "config",
    [
        CONFIGS["llama"],
        MixtralConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2),
        MambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2),
    ],
    ids=lambda config: config.model_type,
)
def test_layers_out_of_reach_are_known_without_weights(config: Any) -> None:
    found = described(config, LoraSettings(rank=4, alpha=8), attention="auto")
    assert found.reached
    model = AutoModelForCausalLM.from_config(config).eval()
    weights = LoraWeights(LoraSettings(rank=4, alpha=8))
    adapted = weights.attach(model, unreached=unreached_layers(model))
    assert found.shape == shape_of(adapted)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    ("ids", "trained"),
    [((88, 89), True), ((90, 91, 92), True), ((2, 90), True), ((2, 90), False)],
    ids=["rows to spare", "grown", "known and grown", "grown and frozen"],
)
def test_added_tokens_have_rows_that_are_trained_where_they_are_new(
    name: str, ids: tuple[int, ...], trained: bool
) -> None:
    """And the output head is no layer of the decoder, whatever wraps it."""
    config = CONFIGS[name]
    before = _shape(config)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    added = AddedTokens({str(i): i for i in ids if i > 80}, {str(i): i for i in ids if i < 80})
    make_rows(model, added)
    weights = LoraWeights(LoraSettings(rank=4, alpha=8))
    adapted = weights.attach(model, added_ids=ids if trained else ())
    found = described(
        config, LoraSettings(rank=4, alpha=8), attention="auto",
        added=added, trains_added=trained,
    ).shape  # fmt: skip
    assert found == shape_of(adapted)
    assert found.trained == sum(p.numel() for p in trainable_parameters(adapted).values())
    own_head = not config.tie_word_embeddings
    rows = (1 + own_head) * len(ids) * 32
    assert found.trained == before.trained + (rows if trained else 0)
    assert found.parameters == before.parameters + (1 + own_head) * sum(i >= 90 for i in ids) * 32
    assert (found.linear, found.in_linear) == (before.linear, before.in_linear)
    assert (config.vocab_size, config.dtype) == (90, None)


def test_padded_rows_are_known_as_far_as_a_class_says() -> None:
    """Against the examination of the real model, which finds out more of some."""
    only_seen = set()
    for name, (family, _) in PADDED.items():
        model = family.make()
        adapter: dict[str, Any] = {"rank": 4, "alpha": 8, "target_modules": "all-linear"}
        found = described(model.config, LoraSettings(**adapter), attention="auto").padded
        if not found:
            only_seen.add(name)
        assert probe_packing(model).obstacle is not None
    # mamba2 is among the others: its forward needs numbers, and its out_proj no adapter may have.
    assert only_seen == {"lfm2", "minimax", "nemotron", "gpt-oss", "llama4"}


def test_a_token_meets_the_experts_it_reaches() -> None:
    config = MixtralConfig(**_SMALL, num_local_experts=4, num_experts_per_tok=2)
    shape = _shape(config, ("q_proj",))
    attention = 32 * (32 + 16 + 16) + 32 * 32
    assert shape.linear == 3 * (attention + 2 * 3 * 32 * 48 + _router(config))


def _router(config: Any) -> int:
    """Its size, where it is a linear layer."""
    model = AutoModelForCausalLM.from_config(config)
    linear = [m for n, m in model.named_modules() if n.endswith("gate")]
    return 4 * 32 if isinstance(linear[0], torch.nn.Linear) else 0


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "k_proj", "v_proj")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(targets: Any, checkpointing: bool) -> None:
    """One sequence through transformers and peft, every token but the first trained.

    What differs is known: torch counts the causal half of attention whole, and what is not
    computed is left out: gradients of frozen embeddings, and the end of a recomputed layer.
    """
    config = MistralConfig(**_SMALL, sliding_window=None, attn_implementation="eager")
    shape, rows = _shape(config, targets), 17
    # In float64, which tandem's own products, whose operations torch cannot see, leave alone.
    weights = LoraWeights(LoraSettings(rank=4, alpha=8, target_modules=targets))
    model: Any = weights.attach(AutoModelForCausalLM.from_config(config).double())
    if checkpointing:
        recompute(model)
        model.train()
    ids = torch.arange(rows)[None]
    with FlopCounterMode(display=False) as counter:
        logps = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        logps.sum().backward()
    backward = counter.get_total_flops()

    found = count_operations(shape, _work(rows), reference=True, checkpointing=checkpointing)
    unseen = 2 * shape.attention * (rows * rows - rows * (rows + 1) // 2)
    assert forward == pytest.approx(found.forward + unseen)
    once_more = found.recomputed + unseen if checkpointing else 0.0
    if checkpointing:  # a layer's last product keeps nothing for the backward
        once_more -= 2 * rows * 3 * (4 * 32 if targets == "all-linear" else 48 * 32)
    # Checkpointed layers are told to want a gradient of the embeddings.
    of_embeddings = 0 if checkpointing else 2 * rows * (32 * (32 + 16 + 16) + 3 * 4 * 32)
    assert backward == pytest.approx(found.backward + once_more + 2 * unseen - of_embeddings)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), model.disable_adapter():
        model(input_ids=ids, use_cache=False)
    assert counter.get_total_flops() == pytest.approx(found.reference + unseen)
    assert found.reference_share == found.reference / (found.training + found.reference)


def _work(rows: int) -> Workload:
    visible = rows * (rows + 1) / 2
    return Workload(
        records=1, steps=1, examples=1, tokens=rows, tokens_per_epoch=rows, padded_tokens=rows,
        shared_tokens=0, targets=rows, visible=visible, longest=rows, packed_steps=1,
        micro_batches=1, fill=1.0, imbalance=1.0, largest=rows, reference_tokens=rows,
        reference_targets=rows, reference_visible=visible,
    )  # fmt: skip


def test_a_configuration_that_is_none_is_refused() -> None:
    config = ViTConfig()
    with pytest.raises(UserError, match="describes no causal language model"):
        _shape(config)
    with pytest.raises(UserError, match="'nowhere_proj' fits no module"):
        _shape(CONFIGS["llama"], ("nowhere_proj",))


def test_a_model_whose_sizes_have_other_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.plan import model_shape as shape

    def strange(_: Any) -> Any:
        raise AttributeError("no attribute 'hidden_size'")

    monkeypatch.setattr(shape, "shape_of", strange)
    with pytest.raises(UserError, match="no attribute 'hidden_size'"):
        _shape(CONFIGS["llama"])


def test_memory_by_engine() -> None:
    shape = _shape(CONFIGS["llama"])
    held = MemoryUse(
        weight_bytes=2, quantized=False, copies=0, checkpointing=False, tokens=100,
        activation_bytes=10.0, head_bytes=1000, baseline=50,
    )  # fmt: skip
    single, _, zero2, zero3, fsdp2 = (memory_of(shape, held, engine, 1) for engine in SHARDS)
    assert single == zero2 == zero3 == fsdp2  # a single process has nobody to share with
    assert single.weights == 2 * shape.parameters
    assert (single.adapter, single.optimizer) == (4 * shape.trained, 8 * shape.trained)
    blocks = 3 * 1000 + 100 * 32 * (4 + 2)
    assert single.peak == single.weights + 16 * shape.trained + 1000 + blocks + 50
    _, ddp, zero2, zero3, fsdp2 = (memory_of(shape, held, engine, 4) for engine in SHARDS)
    assert ddp == single
    assert (zero2.weights, zero2.adapter) == (single.weights, single.adapter)
    assert (zero2.gradients, zero2.optimizer) == (single.gradients // 4, single.optimizer // 4)
    assert zero3 == fsdp2
    assert zero3.weights == shape.parameters // 2 + 4 * shape.largest_layer
    assert zero3.adapter == single.adapter // 4
    averaged = [memory_of(shape, replace(held, average=True), name, 4) for name in ("ddp", "fsdp2")]
    assert averaged[0].adapter == 2 * single.adapter
    assert averaged[1].adapter == 2 * single.adapter // 4


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adamw_8bit", "adafactor", "lion", "muon", "schedule_free_adamw"]
)
def test_memory_of_the_optimizer_is_what_it_keeps(optimizer: str) -> None:
    """Of an adapter as wide as real ones: counts of steps and scales of blocks are left out."""
    config = LlamaConfig(**_SMALL | {"hidden_size": 1024, "intermediate_size": 2048})
    model = AutoModelForCausalLM.from_config(config)
    adapted = LoraWeights(LoraSettings(rank=16, target_modules=["up_proj", "down_proj"])).attach(
        model, unreached=()
    )
    parameters = trainable_parameters(adapted)
    free = {"lr_scheduler": "constant"} if optimizer == "schedule_free_adamw" else {}
    settings = SftSettings(data=(DataSource(path="x"),), optimizer=optimizer, **free)
    device = Device(torch.device("cpu"), torch.float32)
    made = make_optimizer(parameters, settings, device, hidden_matrices(adapted))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    kept = state_of(made, parameters)
    qmaps = 2 * 256 * 4 * len(parameters) if optimizer == "adamw_8bit" else 0
    found = sum(t.numel() * t.element_size() for t in kept.values()) - qmaps
    assert state_bytes(shape_of(adapted), optimizer) == pytest.approx(found, rel=0.02)


def test_checkpoints_hold_what_the_optimizer_keeps() -> None:
    shape = _shape(CONFIGS["llama"])
    held = {}
    for name in ("adamw", "lion", "schedule_free_adamw"):
        settings = SftSettings(
            data=(DataSource(path="x"),),
            optimizer=name,
            lr_scheduler="constant",
            save_total_limit=2,
        )
        disk = disk_of(shape, settings, steps=10, save_steps=2, merged_bytes=2)
        held[name] = disk.checkpoints / disk.adapter
        averaged = settings.model_copy(update={"ema_decay": 0.9})
        more = disk_of(shape, averaged, steps=10, save_steps=2, merged_bytes=2)
        beside = 0 if name == "schedule_free_adamw" else 2 * disk.adapter
        assert more.checkpoints - disk.checkpoints == beside
    assert held == {"adamw": 2 * 3, "lion": 2 * 2, "schedule_free_adamw": 2 * 4}


def test_four_bits_and_checkpointing_take_less() -> None:
    shape = _shape(CONFIGS["llama"])
    held = {"weight_bytes": 2, "copies": 0, "tokens": 100, "activation_bytes": 3e4,
            "head_bytes": 0, "baseline": 0}  # fmt: skip
    plain = memory_of(shape, MemoryUse(quantized=False, checkpointing=False, **held), "single", 1)
    less = memory_of(shape, MemoryUse(quantized=True, checkpointing=True, **held), "single", 1)
    packed = shape.in_linear * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert less.weights == pytest.approx(2 * (shape.parameters - shape.in_linear) + packed, abs=1)
    assert less.activations == 100 * (3 * 32 * 2 + 10_000)
    assert plain.activations == 3_000_000


def test_dora_trains_lengths_and_keeps_outputs() -> None:
    lora = LoraSettings(rank=4, alpha=8, dora=True, target_modules=("q_proj", "down_proj"))
    plain = _shape(CONFIGS["llama"], ("q_proj", "down_proj"))
    shape = described(CONFIGS["llama"], lora, attention="auto").shape
    outputs = 3 * (32 + 32)  # of three layers
    assert (shape.decomposed, plain.decomposed) == (outputs, 0)
    assert shape.trained == plain.trained + outputs
    held = MemoryUse(
        weight_bytes=2, quantized=False, copies=0, checkpointing=False, tokens=100,
        activation_bytes=10.0, head_bytes=0, baseline=0,
    )  # fmt: skip
    more, less = (memory_of(each, held, "single", 1) for each in (shape, plain))
    assert more.activations - less.activations == 100 * 2 * outputs
