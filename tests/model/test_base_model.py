"""An adapter finds the model that it was trained on from any folder, and never another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from tandem.errors import UserError
from tandem.model import base_model
from tandem.model.base_model import find_base, lasting_name
from tandem.model.model_folder import (
    context_length,
    described_rows,
    read_config,
    stated_config,
)
from tandem.storage.atomic_files import read_json
from tandem.storage.hashing import hash_weights

from ..stages.made_inputs import make_model_folder
from .test_adapter_folder import make_adapter


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a model and an adapter of it."""
    home = tmp_path_factory.mktemp("home")
    base = make_model_folder(home / "models" / "tiny")
    make_adapter(base, home / "runs" / "r" / "1-sft", r=2)
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made, tmp_path / "home")


def named(home: Path, name: Any, *, trained_on: Path | None = None, **more: Any) -> Path:
    """The adapter, after its configuration names a base and its manifest the weights."""
    adapter = home / "runs" / "r" / "1-sft"
    path = adapter / "adapter_config.json"
    config = read_json(path) | {"base_model_name_or_path": name} | more
    path.write_text(json.dumps(config))
    if trained_on is not None:
        manifest = {
            "stage": "sft", "status": "finished", "schedule": {}, "outputs": {}, "started_at": "",
            "inputs": {"model": {"weights": hash_weights(trained_on)}},
        }  # fmt: skip
        (adapter / "manifest.json").write_text(json.dumps(manifest))
    return adapter


def another(home: Path, folder: Path) -> Path:
    """A model of the same shape and other weights."""
    shutil.copytree(home / "models" / "tiny", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_what_is_written_down_holds_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    folder = Path("models/tiny")
    assert lasting_name("models/tiny", folder) == (str(tmp_path / "models" / "tiny"), None)
    monkeypatch.chdir(tmp_path / "models")
    assert lasting_name("../models/tiny", folder) == (str(tmp_path / "models" / "tiny"), None)
    assert lasting_name("demo:base", tmp_path / "made") == (str(tmp_path / "made"), None)
    snapshot = tmp_path / "hub" / "models--some--tiny" / "snapshots" / ("0" * 40)
    assert lasting_name("some/tiny", snapshot) == ("some/tiny", "0" * 40)


@pytest.mark.parametrize("known", [True, False])
def test_a_relative_name_is_looked_for_above_the_adapter(home: Path, known: bool) -> None:
    adapter = named(home, "models/tiny", trained_on=home / "models/tiny" if known else None)
    assert find_base(adapter).resolve() == home / "models" / "tiny"


def test_another_model_of_the_same_name_is_never_taken(home: Path, tmp_path: Path) -> None:
    other = another(home, tmp_path / "models" / "tiny")
    adapter = named(home, "models/tiny", trained_on=home / "models" / "tiny")
    assert find_base(adapter).resolve() == home / "models" / "tiny"
    shutil.rmtree(home / "models")
    with pytest.raises(UserError, match="was trained on other weights than those of models/tiny"):
        find_base(adapter)
    adapter = named(home, str(other))
    with pytest.raises(UserError, match=f"was trained on other weights than those of {other}"):
        find_base(adapter)


def test_without_a_hash_two_of_one_name_are_refused(home: Path, tmp_path: Path) -> None:
    adapter = named(home, "models/tiny")
    shutil.copytree(home / "models", tmp_path / "models")
    assert find_base(adapter).resolve() == tmp_path / "models" / "tiny"  # the same weights
    shutil.rmtree(tmp_path / "models")
    another(home, tmp_path / "models" / "tiny")
    with pytest.raises(UserError, match="several models of that name with other weights"):
        find_base(adapter)


def test_a_run_that_was_moved_as_a_whole_is_found_by_its_hash(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "models" / "tiny", home / "runs" / "r" / "2-sft-merged")
    adapter = named(home, "/gone/runs/r/2-sft-merged", trained_on=home / "models" / "tiny")
    assert find_base(adapter) == home / "runs" / "r" / "2-sft-merged"
    (adapter / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"of /gone/runs/r/2-sft-merged, and that folder is gone"):
        find_base(adapter)


@pytest.mark.parametrize("name", ["/no/such/model", "./gone", "~nobody-here/model", "a/b/c"])
def test_a_folder_that_is_gone_is_said_to_be(
    home: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "model_folder", None)  # never asked
    with pytest.raises(UserError, match=f"an adapter of {name}, and that folder is gone"):
        find_base(named(home, name))


def test_what_may_be_a_hub_id_says_both(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def model_folder(name: str, revision: str | None = None) -> Path:
        asked.append((name, revision))
        raise UserError(f"model {name} cannot be fetched.")

    monkeypatch.setattr(base_model, "model_folder", model_folder)
    adapter = named(home, "some/tiny", revision="0" * 40)
    with pytest.raises(UserError, match=r"no such folder in .*; and as a Hub id: model some/tiny"):
        find_base(adapter)
    assert asked == [("some/tiny", "0" * 40)]


@pytest.mark.parametrize(
    ("name", "said"), [(None, "is null"), ("", "is ''"), ("  ", "is '  '"), (["x"], r"is \['x'\]")]
)
def test_no_name_is_named_as_what_it_is(home: Path, name: Any, said: str) -> None:
    with pytest.raises(
        UserError, match=rf"which model it was trained on: base_model_name_or_path {said}\. "
    ):
        find_base(named(home, name))


@pytest.mark.parametrize(
    "architecture",
    ["llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "olmo2", "granite"],
)
@pytest.mark.parametrize("tied", [True, False, None])
def test_what_a_configuration_states_is_what_transformers_reads(
    architecture: str, tied: bool | None, tmp_path: Path
) -> None:
    values = {"vocab_size": 300, "max_position_embeddings": 77, "tie_word_embeddings": tied}
    written = {key: value for key, value in values.items() if value is not None}
    config = CONFIG_MAPPING[architecture](pad_token_id=None, **written).to_dict()
    if tied is None:
        del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    stated, theirs = stated_config(tmp_path), read_config(tmp_path)
    assert stated is not None
    assert theirs.get_text_config() is theirs
    assert (described_rows(stated), context_length(stated)) == (300, 77)
    assert (described_rows(theirs), context_length(theirs)) == (300, 77)
    assert stated.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"vocab_size": None},
        {"max_position_embeddings": "77"},
        {"tie_word_embeddings": None},
        {"pad_token_id": 300},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_what_a_configuration_does_not_state_is_left_to_transformers(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 77}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stated_config(tmp_path) is not None
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert stated_config(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert stated_config(tmp_path) is None
