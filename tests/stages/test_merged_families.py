"""Every family, as its files look on the Hub: trained, merged under the files' names, loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tandem.errors import UserError
from tandem.model.load_model import load_adapter, load_model
from tandem.model.lora.adapter import LoraWeights
from tandem.model.lora.targets import unreached_layers
from tandem.model.trained_weights import trainable_parameters
from tandem.model.weight_files import parts_of
from tandem.recipe.training_settings import LoraSettings
from tandem.stages.sft import run_sft
from tandem.storage.atomic_files import read_json
from tests.jobs import training_job

from ..invariants.families import ALTERNATING, GATED, PADDED, TREES
from .made_inputs import QUIET, make_conversations, make_model_folder
from .test_merge import merged
from .test_training_stages import run, settings

WEIGHTS = "model.safetensors"
Form = Callable[[dict[str, Tensor]], dict[str, Tensor]]
ALL = {**TREES, **{name: family for name, (family, _) in PADDED.items()}}
# Families whose files have the names in memory, one tensor for each weight, and whose layers are of
# kinds that others here have: what training makes of them is seen in the others, so that an adapter
# that was not trained shows the same.
PLAIN = (
    "mistral", "llama tied", "qwen2", "qwen3", "gemma2", "granite", "cohere", "cohere2", "olmo2",
    "smollm3", "glm4", "gpt2 untied", "mamba", "mamba2", "nemotron", "stablelm", "lfm2",
)  # fmt: skip


def without(prefix: str) -> Form:
    """Names as a body without a head has them."""
    return lambda weights: {name.removeprefix(prefix): w for name, w in weights.items()}


def with_buffers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With what older versions wrote besides."""
    return {**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


# What differs between a family's files on the Hub and what save_pretrained writes of it. Bodies
# that were saved without their head have names without the prefix, too.
ON_THE_HUB: dict[str, Form] = {
    "gpt2": without("transformer."),
    "bloom": without("transformer."),
    "opt": without("model."),
    "llama": with_buffers,
    "qwen2 tied": without("model."),
    "falcon-mamba": without("backbone."),
}


def make_base(folder: Path, config: Any, form: Form | None = None) -> Path:
    """A model folder whose weights have the names of `form`."""
    base = make_model_folder(folder, config=config)
    if form is not None:
        renamed = form(load_file(base / WEIGHTS))
        save_file(renamed, base / WEIGHTS, metadata={"format": "pt"})
    return base


def config_of(name: str) -> Any:
    family = ALL[name]
    options = {**family.options, "bos_token_id": 0, "eos_token_id": 1}
    return getattr(transformers, family.config)(**options)


def gemma_with_vision() -> Any:
    text = {**GATED, **ALTERNATING, "query_pre_attn_scalar": 8, "bos_token_id": 0}
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 14,
        "num_attention_heads": 2, "patch_size": 7,
    }  # fmt: skip
    return transformers.Gemma3Config(
        text_config={**text, "vocab_size": 300, "eos_token_id": 1, "pad_token_id": 1},
        vision_config=vision, mm_tokens_per_image=4, image_token_index=299, boi_token_index=298,
        eoi_token_index=297,
    )  # fmt: skip


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(3, 24)[None]).logits
    return found


def check_merged(base: Path, adapter: Path, output: Path) -> dict[str, Tensor]:
    """Merge; the result loads in plain transformers, under the base's names, and says the same."""
    merged(base, adapter, output)
    # The layers of RWKV are under a name that no other family has.
    by_layers = read_json(base / "config.json")["model_type"] != "rwkv"
    checked = read_json(output / "summary.json")["checked"]
    assert checked == ("layer by layer" if by_layers else "whole")
    ours, found = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    together = load_adapter(load_model(base, dtype=torch.float32), adapter)
    expected = logits_of(together)
    assert (logits_of(ours) - expected).abs().max() < 1e-5
    with together.disable_adapter():
        assert (logits_of(together) - expected).abs().max() > 1e-4
    weights = {k: w for shard in output.glob("*.safetensors") for k, w in load_file(shard).items()}
    before = [name for shard in base.glob("*.safetensors") for name in load_file(shard)]
    assert sorted(weights) == sorted(before)
    return weights


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_familys_tensors_are_its_weights(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    parts = parts_of(model.state_dict(), model)
    assert [(part.weights, part.converter) for part in parts] == [(p.names, None) for p in parts]
    assert {part.names for part in parts} == {(weight,) for weight in model.state_dict()}


def made_adapter(base: Path, folder: Path) -> Path:
    """An adapter of all layers whose numbers are random."""
    model = load_model(base, dtype=torch.float32)
    weights = LoraWeights(
        LoraSettings(rank=2, alpha=4, target_modules="all-linear"), base=str(base)
    )
    adapted = weights.attach(model, unreached=unreached_layers(model))
    tensors = {name: torch.randn_like(t) * 0.1 for name, t in trainable_parameters(adapted).items()}
    folder.mkdir()
    weights.save(adapted, folder, tensors)
    return folder


def test_plain_families_are_merged_and_loaded(tmp_path: Path) -> None:
    for name in PLAIN:
        root = tmp_path / name.replace(" ", "-")
        root.mkdir()
        base = make_base(root / "base", config_of(name))
        check_merged(base, made_adapter(base, root / "adapter"), root / "merged")


@pytest.mark.parametrize("name", [name for name in ALL if name not in PLAIN])
def test_a_family_is_trained_merged_and_loaded(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", config_of(name), ON_THE_HUB.get(name))
    run("sft", base, tmp_path / "sft", max_steps=1)
    check_merged(base, tmp_path / "sft", tmp_path / "merged")


def test_a_model_with_a_vision_tower_keeps_its_names(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", gemma_with_vision())
    assert "language_model.model.layers.0.mlp.up_proj.weight" in load_file(base / WEIGHTS)
    run("sft", base, tmp_path / "sft", max_steps=1)
    check_merged(base, tmp_path / "sft", tmp_path / "merged")


def test_experts_are_merged_one_by_one_to_the_last_bit(tmp_path: Path) -> None:
    """Expert e gains scaling * B_e @ A_e, its rank doubled where two matrices are one in memory."""
    base = make_base(tmp_path / "base", config_of("mixtral"))
    tensors = run("sft", base, tmp_path / "sft", max_steps=1)
    ours = check_merged(base, tmp_path / "sft", tmp_path / "merged")
    before = load_file(base / WEIGHTS)
    path = "base_model.model.model.layers.1.mlp.experts"
    a, b = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
    fused_a = tensors[f"{path}.base_layer.lora_A.weight"].view(4, 8, 32)
    fused_b = tensors[f"{path}.base_layer.lora_B.weight"].view(96, 8, 4)
    for expert in range(4):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}"
        down = 2.0 * b.view(32, 4, 4)[:, :, expert] @ a.view(4, 4, 48)[expert]
        both = 2.0 * fused_b[:, :, expert] @ fused_a[expert]
        for own, delta in (("w2", down), ("w1", both[:48]), ("w3", both[48:])):
            expected = before[f"{name}.{own}.weight"] + delta
            torch.testing.assert_close(ours[f"{name}.{own}.weight"], expected, rtol=0, atol=1e-6)
            assert delta.abs().max() > 1e-5
    check_in_several_shards(base, ours, tmp_path)


def check_in_several_shards(base: Path, whole: dict[str, Tensor], tmp_path: Path) -> None:
    """Tensors of one weight may lie in several files."""
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="20KB")
    (base / WEIGHTS).unlink()
    assert len(list(base.glob("*.safetensors"))) > 3
    merged(base, tmp_path / "sft", tmp_path / "parts", force=True)
    parts = [load_file(shard) for shard in (tmp_path / "parts").glob("*.safetensors")]
    assert sum(map(len, parts)) == len(whole)
    assert all(torch.equal(weight, whole[k]) for part in parts for k, weight in part.items())


@pytest.mark.parametrize("changes", [{"added_tokens": ["<x>"]}, {"quantization": "nf4"}], ids=str)
def test_added_tokens_and_rounded_weights_are_found_under_the_files_names(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    base = make_base(tmp_path / "base", config_of("gpt2"), ON_THE_HUB["gpt2"])
    run_sft(
        training_job(
            settings("sft", make_conversations(tmp_path / "data.jsonl"), max_steps=1),
            base,
            tmp_path / "sft",
            tokens_per_microbatch=2048,
            quantization=changes.get("quantization"),
            added_tokens=changes.get("added_tokens", []),
        ),
        QUIET,
    )
    # The merge compares log-probs with base and adapter, of the added token, too.
    merged(base, tmp_path / "sft", tmp_path / "merged")
    weights = load_file(tmp_path / "merged" / WEIGHTS)
    assert sorted(weights) == sorted(load_file(base / WEIGHTS))
    assert len(weights["wte.weight"]) == len(load_file(base / WEIGHTS)["wte.weight"]) + bool(
        changes.get("added_tokens")
    )


def test_a_weight_of_eight_bits_is_refused_before_a_step(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", config_of("llama"))
    weights = load_file(base / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    save_file(weights, base / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is stored as F8_E4M3.*16-bit edition"):
        run("sft", base, tmp_path / "sft", max_steps=1)
    assert not (tmp_path / "sft" / "adapter_model.safetensors").exists()
