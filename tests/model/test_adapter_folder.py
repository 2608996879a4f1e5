"""Adapters of every kind that peft writes: merged exactly, or refused by name in every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tandem.errors import UserError
from tandem.evaluate.eval_model import find_eval_model
from tandem.evaluate.own_measures import OwnMeasures
from tandem.integrations.choose import choose_device
from tandem.model.load_model import load_adapter, load_for_inference, load_model
from tandem.model.lora.adapter_folder import copied_weights, read_updates
from tandem.model.merge_weights import MergedShards
from tandem.model.model_folder import load_config, model_without_weights
from tandem.stages.merge import run_merge
from tests.jobs import merge_job, run_settings

from ..stages.made_inputs import make_model_folder

# peft 0.21 still asks transformers 5 under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("base"))


def make_adapter(base: Path, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Save an adapter that has learnt something; returns the weights that peft merges it to."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | settings
    model = get_peft_model(
        load_model(base, dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **options)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                scale = 0.1 * float(parameter.std()) if "magnitude" in name else 0.05
                parameter += scale * torch.randn_like(parameter)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    merged: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return merged


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_adapter(base, folder)
    return folder


@pytest.fixture
def spoilt(plain: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a plain adapter whose configuration says something else."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "spoilt"
        shutil.copytree(plain, folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return make


def refused(folder: Path, *said: str) -> None:
    """Merging, chat and evaluation refuse an adapter with the same words."""
    heard = []
    for command in (
        lambda: read_updates(folder),
        lambda: load_for_inference(str(folder), "cpu"),
        lambda: find_eval_model("it", str(folder)),
    ):
        with pytest.raises(UserError) as error:
            command()
        heard.append(str(error.value))
    assert len(set(heard)) == 1
    for words in said:
        assert words in heard[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"use_dora": True},
        {"use_dora": True, "init_lora_weights": "pissa"},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
        {"exclude_modules": ["down_proj"]},
        {"layers_to_transform": [1]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True},
    ],
    ids=lambda settings: "-".join(map(str, settings)) or "plain",
)
def test_the_sum_is_what_peft_merges(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = make_adapter(base, tmp_path / "adapter", **settings)
    (tmp_path / "merged").mkdir()
    described = model_without_weights(load_config(base))
    updates = read_updates(tmp_path / "adapter")
    with MergedShards(base, updates, tmp_path / "merged", model=described, dtype=None) as shards:
        shards.finish()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6)
    assert any(not torch.equal(found[name], before[name]) for name in found)


def test_torch_s_own_format_is_read_as_safetensors_is(
    base: Path, plain: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(plain, old)
    tensors = load_file(old / "adapter_model.safetensors")
    (old / "adapter_model.safetensors").unlink()
    torch.save(tensors, old / "adapter_model.bin")
    ours, theirs = read_updates(old), read_updates(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].delta(), theirs[name].delta()) for name in ours)  # type: ignore[union-attr]
    load_for_inference(str(plain), "cpu")
    (old / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(UserError, match=r"adapter_model\.bin cannot be read: .*Convert it"):
        read_updates(old)


def test_copies_of_the_base_s_embeddings_change_nothing(
    base: Path, plain: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(plain, copied)
    name = "model.embed_tokens.weight"
    path = copied / "adapter_model.safetensors"
    tensors, own = load_file(path), load_file(base / "model.safetensors")[name]
    save_file({**tensors, f"base_model.model.{name}": own.to(torch.bfloat16)}, path)
    assert list(copied_weights(copied)) == [name]
    assert read_updates(copied).keys() == read_updates(plain).keys()
    load_for_inference(str(copied), "cpu")
    save_file({**tensors, f"base_model.model.{name}": own * 1.1}, path)
    with pytest.raises(UserError, match=r"holds model\.embed_tokens\.weight as a whole.*peft"):
        load_adapter(load_model(base, dtype=torch.float32), copied)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"peft_type": "IA3"}, "type IA3"),
        ({"peft_type": "VERA"}, "type VERA"),
        ({"peft_type": "PROMPT_TUNING"}, "type PROMPT_TUNING"),
        ({"peft_type": "OF_NO_KIND"}, "type OF_NO_KIND"),
        ({"bias": "all"}, "biases as well (bias 'all')"),
        ({"lora_bias": True}, "biases of its own (lora_bias true)"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "repeats layers"),
        ({"alora_invocation_tokens": [1, 2]}, "invocation tokens"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"arrow_config": {"top_k": 1}}, "Arrow"),
        ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
        ({"velora_config": {"num_groups": 2}}, "VeLoRA"),
        ({"monteclora_config": {"a": 1}}, "MonteCLoRA"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16'"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights set to true"),
        ({"init_lora_weights": "lora_ga"}, "cannot be computed again"),
        ({"use_lora_of_tomorrow": True, "peft_version": "9.1"}, "use_lora_of_tomorrow true"),
        ({"tomorrow_config": {"a": 1}}, "Update peft"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": 0}, "r 0"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern is {'q_proj': '4'}"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_is_more_than_a_sum_of_low_rank_is_named_in_every_command(
    spoilt: Callable[..., Path], settings: dict[str, Any], said: str
) -> None:
    folder = spoilt(**settings)
    refused(folder, str(folder), said)


def test_a_newer_peft_s_settings_that_are_off_are_no_matter(
    spoilt: Callable[..., Path],
) -> None:
    folder = spoilt(use_lora_of_tomorrow=False, tomorrow_config=None, tomorrow_group_size=16)
    assert read_updates(folder)
    load_for_inference(str(folder), "cpu")


def test_low_rank_updates_of_embeddings_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"])
    refused(tmp_path / "adapter", "changes embeddings by low-rank updates")


def test_adapters_in_the_folders_of_a_folder_are_named(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "all" / "one")
    shutil.copytree(plain, tmp_path / "all" / "two")
    with pytest.raises(UserError, match="its folders one, two are adapters: name one"):
        read_updates(tmp_path / "all")
    for command in (load_for_inference, lambda folder, _: find_eval_model("it", folder)):
        with pytest.raises(UserError, match="its folders one, two are adapters: name one"):
            command(str(tmp_path / "all"), "cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"use_dora": True},
        {"modules_to_save": ["norm", "lm_head", "gate_proj"]},
    ],
)
def test_a_merge_and_a_chat_answer_alike(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    make_adapter(base, tmp_path / "adapter", **settings)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    copied = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file(load_file(path) | {"base_model.model.model.embed_tokens.weight": copied}, path)
    heard = StringIO()
    merged = run_merge(
        merge_job(base, tmp_path / "adapter", tmp_path / "merged"), Console(file=heard, width=1000)
    )
    assert "model.embed_tokens.weight in " in heard.getvalue()
    assert "is skipped: it equals the base's own" in heard.getvalue()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        chat = load_for_inference(str(tmp_path / "adapter"), "cpu")[0](input_ids=ids).logits
        whole = load_for_inference(str(merged), "cpu")[0](input_ids=ids).logits
    torch.testing.assert_close(chat, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", ["a layer more", "a layer less", "other names"])
def test_weights_that_find_no_layer_are_not_left_out_in_silence(
    base: Path, plain: Path, tmp_path: Path, case: str
) -> None:
    folder = shutil.copytree(plain, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    if case == "a layer more":
        old, new = "layers.1.", "layers.7."
        tensors |= {name.replace(old, new): t for name, t in tensors.items() if old in name}
    elif case == "a layer less":
        tensors = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    else:
        tensors = {name.removeprefix("base_model.model."): t for name, t in tensors.items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    with pytest.raises(UserError, match=r"does not fit its base model: only the .* has "):
        load_for_inference(str(folder), "cpu")


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings")
def test_an_adapter_on_a_head_that_is_the_embedding_is_named(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    tied = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    base = make_model_folder(tmp_path / "tied", config=tied)
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match=r"changes lm_head\.weight, whose weights output"):
        run_merge(merge_job(base, tmp_path / "adapter", tmp_path / "merged"), Console(quiet=True))
    assert not (tmp_path / "merged").exists()


def test_evaluation_says_that_it_scores_no_adapter_on_the_head(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    adapter = find_eval_model("it", str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="changes the output head, which evaluation scores"):
        OwnMeasures(
            adapter, *adapter.tokenizer("neural-chat"), choose_device("cpu", "auto"),
            run_settings("", tmp_path), Console(quiet=True),
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings")
def test_a_whole_module_that_cannot_be_merged_is_named(base: Path, tmp_path: Path) -> None:
    """One of two tied embeddings, one of another size, and one that its file lacks."""
    from transformers import LlamaConfig

    make_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    tied = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    other = make_model_folder(tmp_path / "tied", config=tied)
    quiet = Console(quiet=True)
    with pytest.raises(UserError, match=r"changes model\.embed_tokens\.weight, whose weights out"):
        run_merge(merge_job(other, tmp_path / "adapter", tmp_path / "merged"), quiet)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    name, tensors = "base_model.model.model.embed_tokens.weight", load_file(path)
    save_file({**tensors, name: torch.ones(7, 32)}, path)
    with pytest.raises(UserError, match=r"does not fit its base model: [^$]*size mismatch"):
        run_merge(merge_job(base, tmp_path / "adapter", tmp_path / "merged"), quiet)
    save_file({n: tensor for n, tensor in tensors.items() if n != name}, path)
    with pytest.raises(UserError, match="does not fit its base model: it lacks 'base_model"):
        load_for_inference(str(tmp_path / "adapter"), "cpu")


@pytest.mark.parametrize("stored", [False, True])
def test_whole_modules_of_a_narrow_base_are_checked_layer_by_layer(
    tmp_path: Path, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tandem.model import load_model as loading

    narrow = make_model_folder(tmp_path / "narrow", dtype=torch.bfloat16)
    whole = ["norm", "embed_tokens", "gate_proj"]
    make_adapter(narrow, tmp_path / "adapter", modules_to_save=whole)
    merged = run_merge(
        merge_job(narrow, tmp_path / "adapter", tmp_path / "merged", dtype="float32"),
        Console(quiet=True),
    )
    summary = json.loads((merged / "summary.json").read_text())
    assert summary["checked"] == "layer by layer"
    assert summary["logp_difference"] < 1e-5 < summary["adapter_effect"]
    if stored:
        monkeypatch.setattr(loading, "_COMFORTABLE", 0.0)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        chat = load_for_inference(str(tmp_path / "adapter"), "cpu")[0](input_ids=ids).logits
        wanted = load_for_inference(str(merged), "cpu")[0](input_ids=ids).logits
    torch.testing.assert_close(chat, wanted, rtol=0, atol=2e-5)


def test_a_head_that_was_trained_as_a_whole_is_scored(base: Path, tmp_path: Path) -> None:
    from tandem.model.logprobs.output_head import head_of

    make_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    adapted = load_adapter(load_model(base, dtype=torch.float32), tmp_path / "adapter")
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(head_of(adapted).weight, trained["base_model.model.lm_head.weight"])
    with adapted.disable_adapter():
        own = load_file(base / "model.safetensors")["lm_head.weight"]
        assert torch.equal(head_of(adapted).weight, own)
