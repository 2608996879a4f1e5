"""Beside merged weights lie the base's configuration, and the adapter's tokenizer and templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tandem.model.companion_files import copy_surroundings, load_combined_tokenizer, write_templates
from tandem.storage.atomic_files import read_json

from ..stages.made_inputs import make_model_folder

PLACES = ("jinja", "config", "named config", "folder", "processor")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "base")


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    """Of an adapter's folder what lies beside its weights."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made / name, folder)
    return folder


def change(path: Path, **values: Any) -> None:
    before = read_json(path) if path.exists() else {}
    path.write_text(json.dumps(before | values))


def put_template(folder: Path, place: str, text: str) -> Any:
    """Put a chat template where some version of transformers keeps it; what tokenizers read."""
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(text)
    elif place == "config":
        change(folder / "tokenizer_config.json", chat_template=text)
    elif place == "named config":
        named = {"default": text, "tool_use": f"{text} tools"}
        listed = [{"name": name, "template": one} for name, one in named.items()]
        change(folder / "tokenizer_config.json", chat_template=listed)
        return named
    elif place == "folder":
        (folder / "chat_template.jinja").write_text(text)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text(f"{text} documents")
        return {"default": text, "rag": f"{text} documents"}
    elif place == "processor":
        change(folder / "chat_template.json", chat_template=text)
    return text


def combined(base: Path, adapter: Path, output: Path) -> Path:
    output.mkdir()
    copy_surroundings(base, adapter, output, None)
    return output


@pytest.mark.parametrize("of_adapter", PLACES)
@pytest.mark.parametrize("of_base", PLACES)
def test_the_adapter_s_templates_win_wherever_they_are(
    base: Path, adapter: Path, tmp_path: Path, of_base: str, of_adapter: str
) -> None:
    put_template(base, of_base, "BASE")
    expected = put_template(adapter, of_adapter, "ADAPTER")
    found = combined(base, adapter, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(found).chat_template == expected
    assert load_combined_tokenizer(base, adapter).chat_template == expected
    assert not any("BASE" in file.read_text() for file in found.rglob("*.j*"))


@pytest.mark.parametrize("place", PLACES)
def test_a_base_s_templates_stay_where_the_adapter_has_none(
    base: Path, adapter: Path, tmp_path: Path, place: str
) -> None:
    expected = put_template(base, place, "BASE")
    found = combined(base, adapter, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(found).chat_template == expected
    assert load_combined_tokenizer(base, adapter).chat_template == expected


def test_an_adapter_without_a_tokenizer_takes_the_base_s_with_its_own_template(
    base: Path, tmp_path: Path
) -> None:
    put_template(base, "named config", "BASE")
    bare = tmp_path / "bare"
    bare.mkdir()
    put_template(bare, "jinja", "ADAPTER")
    found = AutoTokenizer.from_pretrained(combined(base, bare, tmp_path / "out"))
    assert found.chat_template == load_combined_tokenizer(base, bare).chat_template == "ADAPTER"
    assert found.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()


def test_the_adapter_s_special_tokens_win_wherever_they_are(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    change(base / "special_tokens_map.json", eos_token="</s>", pad_token="</s>")
    change(base / "added_tokens.json", **{"<s>": 0, "</s>": 1})
    change(adapter / "tokenizer_config.json", eos_token="<s>")
    found = combined(base, adapter, tmp_path / "out")
    own, out = AutoTokenizer.from_pretrained(adapter), AutoTokenizer.from_pretrained(found)
    assert out.eos_token == own.eos_token == "<s>"
    assert out.special_tokens_map == own.special_tokens_map
    assert out.get_vocab() == own.get_vocab()
    # And where the adapter says it in the older place.
    change(base / "tokenizer_config.json", eos_token="</s>")
    settings = read_json(adapter / "tokenizer_config.json")
    del settings["eos_token"]
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    change(adapter / "special_tokens_map.json", eos_token="<s>", bos_token="<s>")
    found = combined(base, adapter, tmp_path / "older")
    assert AutoTokenizer.from_pretrained(found).eos_token == "<s>"


@pytest.mark.parametrize("same", [True, False])
def test_pieces_of_the_base_stay_only_where_the_adapter_has_them_all(
    base: Path, adapter: Path, tmp_path: Path, same: bool
) -> None:
    (base / "tokenizer.model").write_bytes(b"pieces")
    if not same:
        tokens = read_json(adapter / "tokenizer.json")
        vocabulary = tokens["model"]["vocab"]
        first, last = list(vocabulary)[10], list(vocabulary)[20]
        vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
        (adapter / "tokenizer.json").write_text(json.dumps(tokens))
    assert (combined(base, adapter, tmp_path / "out") / "tokenizer.model").exists() == same
    (adapter / "tokenizer.model").write_bytes(b"its own")
    both = combined(base, adapter, tmp_path / "both")
    assert (both / "tokenizer.model").read_bytes() == b"its own"


def test_nothing_else_of_the_adapter_s_folder_goes_along(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    change(base / "generation_config.json", eos_token_id=1, top_k=7)
    change(
        adapter / "config.json", model_type="gpt2", max_position_embeddings=8,
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
    )  # fmt: skip
    change(adapter / "generation_config.json", eos_token_id=9, max_new_tokens=5)
    names = ("trainer_state.json", "checkpoint.json", "training.txt", "README.txt", "modeling.py")
    for name in names:
        (adapter / name).write_text("{}")
    found = combined(base, adapter, tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert read_json(found / name) == read_json(base / name)
    assert not [name for name in names if (found / name).exists()]


def test_the_configuration_states_the_dtype_of_the_merged_weights(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    change(base / "config.json", torch_dtype="float32")
    (tmp_path / "out").mkdir()
    copy_surroundings(base, adapter, tmp_path / "out", torch.bfloat16)
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["dtype"], "torch_dtype" in config) == ("bfloat16", False)


def test_a_template_that_is_chosen_is_the_only_one(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    for place in ("named config", "folder", "processor"):
        put_template(adapter, place, "OLD")
    out = combined(base, adapter, tmp_path / "made")
    write_templates(out, "NEW")
    assert AutoTokenizer.from_pretrained(out).chat_template == "NEW"
    assert not any("OLD" in file.read_text() for file in out.rglob("*.j*"))
    write_templates(out, {"default": "ONE", "tool_use": "TWO"})
    assert AutoTokenizer.from_pretrained(out).chat_template == {"default": "ONE", "tool_use": "TWO"}
