"""Control tokens whose rows were never trained, found in the weight files alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from tandem.data.tokenize.chat_template import resolve_template
from tandem.model import untrained_rows
from tandem.model.untrained_rows import Untrained, control_tokens, in_words, untrained_tokens
from tandem.storage.atomic_files import atomic_write_json, read_json

from ..stages.made_inputs import make_model_folder

HEAD, INPUT = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with an untied head; its template writes <s> and ends with </s>."""
    return make_model_folder(tmp_path / "model")


def change(folder: Path, name: str, rows: list[int], value: torch.Tensor | float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name][rows] = torch.as_tensor(value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def found(folder: Path, trained: tuple[int, ...] = (), template: str = "neural-chat") -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chosen = resolve_template(tokenizer, template)
    return untrained_tokens(folder, AutoConfig.from_pretrained(folder), tokenizer, chosen, trained)


def test_rows_that_differ_are_not_named(folder: Path) -> None:
    assert found(folder) == []
    assert in_words([]) is None


def test_an_end_token_among_equal_rows_of_the_head(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrained_rows, "_BLOCK", 4 * 32 * 50)  # fifty rows at once
    torch.manual_seed(0)
    row = torch.randn(32)
    change(folder, HEAD, [1, 40, 41, 200, 280], row + 0.01 * torch.randn(5, 32))
    assert found(folder) == [Untrained("</s>", 4, empty=False, ends=True)]
    said = in_words(found(folder))
    assert said is not None
    assert said.startswith("the model cannot learn to stop: answers end with '</s>', whose row")
    assert "nearly equal to those of 4 other tokens" in said
    assert "`added_tokens: [\"</s>\"]` in the recipe, `--added_tokens '</s>'` for a stage" in said
    assert found(folder, trained=(1,)) == []


def test_what_matters_is_the_matrix_in_which_a_token_is_read_or_predicted(folder: Path) -> None:
    """<s> is never predicted, and that </s> is fed like others costs no answer its end."""
    row = torch.randn(32)
    change(folder, HEAD, [0, 40, 41, 200], row)
    change(folder, INPUT, [1, 40, 41, 200], row)
    assert found(folder) == []
    change(folder, INPUT, [0], row)
    assert found(folder) == [Untrained("<s>", 4, empty=False, ends=False)]
    assert "writes '<s>', which this model has never read" in str(in_words(found(folder)))


def test_one_row_beside_it_counts_only_if_it_is_the_same(folder: Path) -> None:
    row = torch.randn(32)
    change(folder, HEAD, [1, 40], row + 0.1 * torch.randn(2, 32))
    assert found(folder) == []
    change(folder, HEAD, [1, 40], row)
    assert found(folder) == [Untrained("</s>", 1, empty=False, ends=True)]


@pytest.mark.parametrize("value", [0.0, 1e-12])
def test_a_row_of_nothing(folder: Path, value: float) -> None:
    change(folder, HEAD, [1], value)
    (one,) = found(folder)
    assert (one.token, one.empty, one.ends) == ("</s>", True, True)
    assert "nearly 0" in str(in_words([one]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_number_format_is_read_and_rows_that_are_not_finite_are_like_no_other(
    folder: Path, dtype: torch.dtype
) -> None:
    weights = {name: w.to(dtype) for name, w in load_file(folder / "model.safetensors").items()}
    torch.manual_seed(0)
    weights[HEAD][[1, 40, 41, 200]] = torch.randn(32).to(dtype)
    for row, value in ((50, math.inf), (51, math.nan), (52, torch.finfo(dtype).max)):
        weights[HEAD][row] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert found(folder) == [Untrained("</s>", 3, empty=False, ends=True)]
    weights[HEAD][1] = math.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert found(folder) == []


def test_a_tied_head_is_the_input_embedding(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[HEAD]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    atomic_write_json(folder / "config.json", {**config, "tie_word_embeddings": True})
    assert found(folder) == []
    change(folder, INPUT, [1, 40, 41, 200], torch.randn(32))
    assert found(folder) == [Untrained("</s>", 3, empty=False, ends=True)]


def test_without_weights_nothing_is_found(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert found(folder) == []


def test_control_tokens_are_single_and_the_ending_comes_first(stories_tokenizer: Any) -> None:
    template = resolve_template(stories_tokenizer, "neural-chat")
    assert list(control_tokens(stories_tokenizer, template).items()) == [("</s>", 2), ("<s>", 1)]


def test_a_real_base_that_never_learnt_to_stop(stories_path: Path) -> None:
    """Of 512 rows 239 are those of tokens that its training never had, and </s> is one."""
    (one,) = found(stories_path)
    assert (one.token, one.ends) == ("</s>", True)
    assert one.alike > 230


def test_the_embedded_base_has_an_end_that_was_trained() -> None:
    import tandem.demo

    assert found(Path(tandem.demo.__file__).parent / "base") == []
