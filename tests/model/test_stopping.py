"""Every file that says where an answer ends knows the template's end token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from tandem.data.records import Turn
from tandem.data.tokenize.chat_template import (
    find_ending,
    prompt_ids,
    render,
    resolve_template,
    tokenize,
)
from tandem.errors import UserError
from tandem.model.companion_files import all_stop_ids, end_ids, write_ends
from tandem.model.model_folder import load_tokenizer
from tandem.storage.atomic_files import read_json

from ..stages.made_inputs import make_model_folder

TEXTS = ["red <|im_end|> sun", "a<|im_end|>\n<|im_start|>b", "</s> x", "<|im_end|> x"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that knows ChatML's tokens, as Qwen's bases do; it ends at </s>."""
    folder = make_model_folder(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<|im_end|>"])  # known, and no special token yet
    tokenizer.save_pretrained(str(folder))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "folder")


def settle(folder: Path, choice: str, base: Path | None = None) -> str | None:
    tokenizer = load_tokenizer(folder)
    template = resolve_template(tokenizer, choice)
    ending = find_ending(tokenizer, template)
    assert ending is not None
    return write_ends(folder, base or folder, tokenizer, template, ending)


def change(path: Path, **values: Any) -> None:
    before = read_json(path) if path.exists() else {}
    path.write_text(json.dumps(before | values))


@pytest.mark.parametrize(
    ("generation", "config", "expected", "named"),
    [
        ({"eos_token_id": 1, "top_k": 5}, 1, [1, "E"], "E"),
        ({"eos_token_id": [1, 0]}, 1, [1, 0, "E"], "E"),
        ({"top_k": 5}, 1, [1, "E"], "E"),
        (None, 1, [1, "E"], "E"),
        (None, [1, 0], [1, 0, "E"], [1, 0, "E"]),
        (None, None, [1, "E"], "E"),
    ],
)
def test_the_end_token_is_known_to_generation_configuration_and_tokenizer(
    folder: Path, generation: dict[str, Any] | None, config: Any, expected: Any, named: Any
) -> None:
    if generation is not None:
        change(folder / "generation_config.json", **generation)
    change(folder / "config.json", eos_token_id=config)
    end = load_tokenizer(folder).convert_tokens_to_ids("<|im_end|>")
    said = settle(folder, "chatml")
    listed = [end if one == "E" else one for one in expected]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == listed == end_ids(folder)
    ids = [end if one == "E" else one for one in named] if isinstance(named, list) else end
    assert AutoConfig.from_pretrained(folder).eos_token_id == ids
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == end
    assert read_json(folder / "tokenizer_config.json")["eos_token"] == "<|im_end|>"
    if generation:
        assert read_json(folder / "generation_config.json") == {
            **generation,
            "eos_token_id": listed,
        }
    assert said == (
        f"answers end with <|im_end|> ({end}): generation stops at "
        f"{', '.join(map(str, listed))}; it is eos_token of config.json and the tokenizer as well"
    )
    assert settle(folder, "chatml") is None  # everything says so by now


def test_texts_become_the_same_tokens_and_turns_the_same_texts(made: Path, folder: Path) -> None:
    settle(folder, "chatml")
    before, after = load_tokenizer(made), load_tokenizer(folder)
    assert tokenize(before, TEXTS) == tokenize(after, TEXTS)
    assert [before(text)["input_ids"] for text in TEXTS] == [
        after(text)["input_ids"] for text in TEXTS
    ]
    turns = [Turn("system", "red"), Turn("user", "sun"), Turn("assistant", "one")]
    templates = [resolve_template(tokenizer, "chatml") for tokenizer in (before, after)]
    assert render(before, templates[0], turns, prompt=False) == render(
        after, templates[1], turns, prompt=False
    )
    assert prompt_ids(before, templates[0], turns[:2]) == prompt_ids(after, templates[1], turns[:2])


def test_an_older_file_of_special_tokens_says_so_too(folder: Path) -> None:
    change(folder / "special_tokens_map.json", eos_token="</s>", bos_token="<s>", pad_token="</s>")
    settle(folder, "chatml")
    found = AutoTokenizer.from_pretrained(folder)
    assert (found.eos_token, found.pad_token) == ("<|im_end|>", "</s>")


def test_a_template_that_writes_eos_token_keeps_its_text(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "both.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{{ '' if add_generation_prompt else eos_token }}"
    )
    said = settle(folder, str(template))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token == "</s>"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_ids(folder) == [1, end]
    assert said is not None
    assert "the tokenizer's eos_token stays </s>, which the chat template writes" in said


def test_a_template_that_ends_with_the_tokenizer_s_own_changes_nothing(
    made: Path, folder: Path
) -> None:
    assert settle(folder, "neural-chat") is None
    names = sorted(file.name for file in made.iterdir())
    assert names == sorted(file.name for file in folder.iterdir())
    assert all((made / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_a_configuration_with_a_text_model_inside_says_so_in_both_places(folder: Path) -> None:
    inner = {"vocab_size": 300, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": inner}))
    tokenizer = load_tokenizer(folder)
    template = resolve_template(tokenizer, "chatml")
    ending = find_ending(tokenizer, template)
    assert ending is not None
    write_ends(folder, folder, tokenizer, template, ending)
    config = read_json(folder / "config.json")
    assert config["eos_token_id"] == config["text_config"]["eos_token_id"] == ending.token_id
    assert end_ids(folder) == [1, ending.token_id]


def test_an_adapter_s_folder_takes_the_rest_from_its_base(
    made: Path, folder: Path, tmp_path: Path
) -> None:
    change(folder / "generation_config.json", eos_token_id=1, top_k=5)
    adapter = tmp_path / "adapter"
    load_tokenizer(made).save_pretrained(str(adapter))
    settle(adapter, "chatml", folder)
    end = load_tokenizer(adapter).eos_token_id
    assert read_json(adapter / "generation_config.json") == {"eos_token_id": [1, end], "top_k": 5}
    assert not (adapter / "config.json").exists()


def test_an_answer_ends_at_the_old_end_token_as_well(folder: Path) -> None:
    settle(folder, "chatml")
    tokenizer = load_tokenizer(folder)
    template = resolve_template(tokenizer, "chatml")
    assert all_stop_ids(folder, tokenizer, template) == [tokenizer.eos_token_id, 1]


def test_a_generation_config_without_an_end_gets_the_one_of_the_configuration(
    folder: Path,
) -> None:
    change(folder / "generation_config.json", top_k=5)
    said = settle(folder, "neural-chat")
    assert said == "answers end with </s> (1): generation stops at 1"
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 1


@pytest.mark.parametrize("value", ["2", 2.0, True, [1, None], {"a": 1}])
def test_an_end_that_is_no_id_is_named(folder: Path, value: Any) -> None:
    change(folder / "generation_config.json", eos_token_id=value)
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is "):
        settle(folder, "chatml")
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"generation_config\.json holds no JSON object"):
        end_ids(folder)
