"""Bad models, adapters, tokenizers and templates: the message names the folder or file."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.storage.hashing import hash_weights

from .desk import Desk

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["./no-model", "no/such/model", "/" + "x" * 300])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_model_path_that_is_not_there_is_never_looked_for_on_the_hub(
    desk: Desk, stage: str, name: str
) -> None:
    desk.refused(desk.train(stage, model_name_or_path=name), f"model folder {name}")


@pytest.mark.parametrize("flag", ["model_name_or_path", "chat_template", "dataset_name"])
def test_a_home_folder_that_nobody_has_is_named_with_its_flag(desk: Desk, flag: str) -> None:
    command = desk.train(**{flag: "~nobody-here/x"})
    desk.refused(command, f"--{flag}: ~nobody-here/x", "home folder ~nobody-here", "write the path")


def test_a_folder_or_a_file_that_is_no_model(desk: Desk) -> None:
    (desk.home / "none").mkdir()
    nothing = desk.home / "none"
    desk.refused(desk.train(model_name_or_path=nothing), "none is no model folder", "config.json")
    desk.refused(desk.train(model_name_or_path=desk.pairs), "pairs.jsonl is a file")
    desk.refused(desk.merge(nothing, nothing), "none is no model folder")
    desk.refused(desk.merge(desk.model, nothing), "none is no adapter folder")
    desk.refused(desk.merge(desk.model, desk.home / "gone"), "gone is no adapter folder")
    desk.refused(["run", desk.recipe(model=str(nothing))], "none is no model folder")
    pairs = {"prompts": str(desk.conversations), "model": str(nothing)}
    desk.refused(["run", desk.recipe(pairs=pairs)], "none is no model folder")
    desk.refused(["chat", str(nothing)], "none is no model folder")


def test_an_adapter_given_as_model_is_told_to_be_merged(desk: Desk) -> None:
    adapter = desk.home / "adapter"
    desk.accepted(desk.train(output_dir=adapter))
    for argv in (
        desk.train(model_name_or_path=adapter),
        desk.train("dpo", model_name_or_path=adapter),
        ["run", desk.recipe(model=str(adapter))],
        desk.merge(adapter, adapter),
    ):
        desk.refused(argv, "adapter holds an adapter, not a whole model", "tandem merge")


def test_max_length_beyond_the_context_names_both(desk: Desk) -> None:
    desk.refused(desk.train(max_length=300), "max_length 300", "256 tokens")
    # The seed's own value, when the flag is left out.
    desk.refused(desk.train("dpo", max_length=None), "max_length 1536", "256 tokens")
    for command in ("run", "plan"):
        recipe = desk.recipe(dpo__max_length=257)
        desk.refused([command, recipe], "Set dpo.max_length to 256", "256 tokens")


@pytest.mark.parametrize("content", [b"", b"\xff" * 500, None])
def test_damaged_weights_are_named(desk: Desk, content: bytes | None) -> None:
    path = desk.model / WEIGHTS
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    for argv in (desk.train(), desk.train("dpo"), ["chat", str(desk.model)]):
        desk.refused(argv, f"{path} is damaged", "again")


def test_a_weight_that_is_missing_is_not_made_up(desk: Desk) -> None:
    weights = load_file(desk.model / WEIGHTS)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, desk.model / WEIGHTS, metadata={"format": "pt"})
    desk.refused(desk.train(), "not a whole model", "model.layers.1.mlp.up_proj.weight")


def test_a_shard_that_the_index_names_and_nobody_copied(desk: Desk) -> None:
    (desk.model / WEIGHTS).rename(desk.model / "model-1.safetensors")
    name = desk.model / INDEX
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    name.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    desk.refused(desk.train(), "lacks model-2.safetensors")
    desk.refused(["run", desk.recipe()], "lacks model-2.safetensors")
    name.write_text("{")
    desk.refused(desk.train(), "index.json is damaged")
    name.write_text('{"weight_map": {}}')
    desk.refused(desk.train(), "names no file with weights")
    name.unlink()
    desk.refused(desk.train(), "has no model.safetensors, and no", INDEX, "(model-1.safetensors)")
    desk.refused(["run", desk.recipe()], "transformers would load none of them")


def test_of_two_editions_the_one_that_transformers_loads_is_trained_and_merged(
    desk: Desk,
) -> None:
    weights = load_file(desk.model / WEIGHTS)
    plain, base = desk.home / "plain", desk.home / "editions"
    desk.accepted(desk.train(output_dir=plain))
    desk.accepted(desk.merge(desk.model, plain))
    shutil.copytree(desk.model, base)
    # An index and shards that another download left, the maker's own format, other precisions.
    other = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    save_file(other, base / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    save_file(other, base / "model.fp16.safetensors", metadata={"format": "pt"})
    save_file({"tok_embeddings.weight": torch.zeros(3, 2)}, base / "consolidated.safetensors")
    names = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names | {"a": "gone"}}))
    (base / "consolidated.safetensors.index.json").write_text("{}")
    (base / "params.json").write_text('{"dim": 2}')
    assert hash_weights(base) == hash_weights(desk.model)
    adapter = desk.home / "adapter"
    desk.accepted(desk.train(model_name_or_path=base, output_dir=adapter))
    desk.accepted(desk.merge(base, adapter, "one"))
    one = {path.name for path in (desk.home / "one").iterdir()}
    assert not any("consolidated" in name or "index" in name or "0000" in name for name in one)
    assert "params.json" not in one
    expected = load_file(desk.home / "merged" / WEIGHTS)
    for name, weight in load_file(desk.home / "one" / WEIGHTS).items():
        assert torch.equal(weight, expected[name])


def test_weights_in_the_one_file_that_an_index_names_load_after_the_merge(desk: Desk) -> None:
    from transformers import AutoModelForCausalLM

    weights = load_file(desk.model / WEIGHTS)
    (desk.model / WEIGHTS).rename(desk.model / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(weights, "model-00001-of-00001.safetensors")
    (desk.model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    desk.accepted(desk.train())
    desk.accepted(desk.merge(desk.model, desk.home / "out"))
    _, found = AutoModelForCausalLM.from_pretrained(desk.home / "merged", output_loading_info=True)
    assert not found["missing_keys"]


def test_weights_that_the_configuration_names_are_taken_as_transformers_does(desk: Desk) -> None:
    (desk.model / WEIGHTS).rename(desk.model / "mine.safetensors")
    config = json.loads((desk.model / "config.json").read_text())
    config["transformers_weights"] = "mine.safetensors"
    (desk.model / "config.json").write_text(json.dumps(config))
    desk.accepted(desk.train())
    desk.accepted(desk.merge(desk.model, desk.home / "out"))
    assert (desk.home / "merged" / "mine.safetensors").is_file()


QUANTIZED = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    {"load_in_4bit": True},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "compressed-tensors", "config_groups": {}},
    {"quant_method": "mxfp4"},
]


@pytest.mark.parametrize("settings", QUANTIZED, ids=str)
def test_a_base_that_is_quantised_already_is_refused_before_the_first_stage(
    desk: Desk, settings: dict[str, Any]
) -> None:
    config = json.loads((desk.model / "config.json").read_text())
    (desk.model / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    adapter = desk.home / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    for argv in (
        desk.train(),
        desk.train("dpo"),
        ["run", desk.recipe()],
        ["plan", desk.recipe()],
        desk.merge(desk.model, adapter),
    ):
        desk.refused(argv, "is quantised already", "16-bit edition", "`quantization: nf4`")


def test_a_quantised_model_that_needs_a_package_is_no_traceback_in_chat(desk: Desk) -> None:
    config = json.loads((desk.model / "config.json").read_text())
    settings = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "format": "int-quantized",
    }
    (desk.model / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    desk.refused(["chat", str(desk.model)], "cannot be loaded as a model", "compressed")


def test_weight_files_get_the_rights_that_the_umask_gives(desk: Desk) -> None:
    before = os.umask(0o022)
    try:
        desk.accepted(desk.train(save_steps=1))
        desk.accepted(desk.merge(desk.model, desk.home / "out"))
    finally:
        os.umask(before)
    written = [path for name in ("out", "merged") for path in (desk.home / name).rglob("*")]
    found = {p.name: p.stat().st_mode & 0o777 for p in written if p.suffix == ".safetensors"}
    assert found.keys() >= {"adapter_model.safetensors", WEIGHTS}
    assert set(found.values()) == {0o644}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"a": 1}', '{"model_type": "of-no-kind"}', '{"model_type": "llama"}']
)
def test_a_config_that_cannot_be_used(desk: Desk, text: str) -> None:
    (desk.model / "config.json").write_text(text)
    desk.refused(desk.train(), str(desk.model))


@pytest.mark.parametrize("text", [None, "", "{", "{}", '{"model": {"type": "Q"}}'])
def test_a_tokenizer_that_is_missing_or_damaged(desk: Desk, text: str | None) -> None:
    path = desk.model / "tokenizer.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    said = "has no tokenizer" if text is None else "has no usable tokenizer"
    desk.refused(
        desk.train(), f"{desk.model} {said}", "tokenizer.json" if text is None else "again"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for m in messages %}{{ m.content }", "line 1: unexpected"),
        ("{{ raise_exception('never') }}", "never"),
        ("only this", "leaves out"),
    ],
)
def test_a_template_that_cannot_be_used(desk: Desk, text: str, said: str) -> None:
    desk.refused(desk.train(chat_template=desk.text(text, "t.jinja")), "t.jinja", said)


@pytest.mark.parametrize("choice", ["neural-chta", "nowhere/t.jinja"])
def test_a_template_that_is_not_there(desk: Desk, choice: str) -> None:
    desk.refused(desk.train(chat_template=choice), choice, "neural-chat")


def test_target_modules_that_fit_nothing_leave_no_trace(desk: Desk) -> None:
    desk.refused(desk.train(lora_target_modules="wq"), "'wq' fits no module", "q_proj")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("wq", "'wq' fits no module"),
        ("norm", "'norm' fits model.norm, which is LlamaRMSNorm"),
        ("mlp", "'mlp' fits model.layers.0.mlp, which is LlamaMLP"),
        ("embed_tokens", "'embed_tokens' fits model.embed_tokens, which is Embedding"),
        ("lm_head", "'lm_head' is the output head"),
    ],
)
def test_a_later_stage_s_target_modules_are_looked_at_before_the_first(
    desk: Desk, target: str, said: str
) -> None:
    recipe = desk.recipe(dpo__lora__target_modules=["q_proj", target])
    for command in ("run", "plan"):
        desk.refused([command, recipe], f"dpo.lora.target_modules: {said}", "q_proj, ")


class TestMerge:
    """An adapter and its base that do not belong together, or are damaged."""

    @pytest.fixture
    def adapter(self, desk: Desk) -> Path:
        """A trained adapter."""
        desk.accepted(desk.train(output_dir=desk.home / "adapter"))
        return desk.home / "adapter"

    def test_another_base(self, desk: Desk, adapter: Path) -> None:
        other = desk.home / "other"
        shutil.copytree(desk.model, other)
        weights = load_file(other / WEIGHTS)
        weights["model.norm.weight"] += 0.1
        save_file(weights, other / WEIGHTS, metadata={"format": "pt"})
        desk.refused(desk.merge(other, adapter), "trained on other weights", "--force")
        desk.accepted([*desk.merge(other, adapter), "--force"])

    def test_damaged_files(self, desk: Desk, adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        sound = path.read_bytes()
        path.write_bytes(sound[:-9])
        desk.refused(desk.merge(desk.model, adapter), f"{path} is damaged")
        path.unlink()
        desk.refused(desk.merge(desk.model, adapter), "has no adapter_model.safetensors")
        path.write_bytes(sound)
        for name in ("adapter_config.json", "manifest.json"):
            text = (adapter / name).read_text()
            (adapter / name).write_text("{")
            desk.refused(desk.merge(desk.model, adapter), f"{adapter / name} cannot be")
            (adapter / name).write_text(text)
        (adapter / "manifest.json").unlink()
        base = desk.model / WEIGHTS
        base.write_bytes(base.read_bytes()[:-9])
        desk.refused(desk.merge(desk.model, adapter), f"{base} is damaged")

    def test_a_check_that_fails_leaves_nothing(self, desk: Desk, adapter: Path) -> None:
        path = adapter / "adapter_model.safetensors"
        weights = load_file(path)
        for name, tensor in weights.items():
            weights[name] = torch.full_like(tensor, float("nan"))
        save_file(weights, path)
        (adapter / "manifest.json").unlink()  # which knows the weights that training left
        desk.refused(desk.merge(desk.model, adapter), "is not finite")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0}'),
        ("config.json", '{"model_type": ["llama"]}'),
        ("config.json", "[1, 2]"),
        ("generation_config.json", "[1, 2]"),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}'),
        ("tokenizer_config.json", "[1, 2]"),
    ],
)
def test_a_configuration_that_no_library_understands_is_a_message(
    desk: Desk, name: str, content: str
) -> None:
    (desk.model / name).write_text(content)
    desk.stopped(desk.train(), str(desk.model))
