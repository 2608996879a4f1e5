"""A small model of the same architecture: what makes a family itself is still there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from tandem.errors import UserError
from tandem.model.stand_in.make_stand_in import make_stand_in
from tandem.model.stand_in.smaller_config import smaller_values

from ..invariants.families import PADDED, TREES, Family
from ..recipe.shipped_models import CONFIGS, config_of
from ..stages.made_inputs import make_model_folder

FAMILIES: dict[str, Family] = {**TREES, **{name: family for name, (family, _) in PADDED.items()}}


def small(config: Any) -> Any:
    return type(config).from_dict(smaller_values(config.to_dict()))


def logits_of(config: Any) -> torch.Tensor:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.arange(2, 14)[None]).logits
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_stand_in_that_computes(name: str) -> None:
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**family.options)
    made = small(config)
    assert made.get_text_config().vocab_size == config.get_text_config().vocab_size
    assert torch.isfinite(logits_of(made)).all()


@pytest.mark.parametrize("model", CONFIGS)
def test_shipped_models_keep_their_structure(model: str) -> None:
    full, made = (each.get_text_config() for each in (config_of(model), small(config_of(model))))
    kept = ("vocab_size", "max_position_embeddings", "tie_word_embeddings", "sliding_window")
    assert [getattr(full, key, None) for key in kept] == [getattr(made, key, None) for key in kept]
    assert made.num_hidden_layers <= 6
    assert made.hidden_size <= 72
    ratio = full.num_attention_heads // full.num_key_value_heads
    assert made.num_attention_heads // made.num_key_value_heads == ratio
    assert made.num_key_value_heads > 1
    for kinds in ("layer_types", "no_rope_layers"):  # each kind of layer is there
        assert set(getattr(made, kinds, None) or ()) == set(getattr(full, kinds, None) or ())
    head = getattr(full, "head_dim", None) or full.hidden_size // full.num_attention_heads
    together = full.num_attention_heads * head, made.num_attention_heads * 8
    wider = [one > config.hidden_size for one, config in zip(together, (full, made), strict=True)]
    assert wider[0] == wider[1]


def test_rotary_settings_fit_the_narrow_heads() -> None:
    phi = small(config_of("microsoft/Phi-4-mini-instruct"))
    rope = phi.rope_parameters
    assert rope["partial_rotary_factor"] == 0.75
    assert len(rope["short_factor"]) == len(rope["long_factor"]) == 3  # 6 of 8 numbers are rotated
    assert rope["long_factor"] == [1.0, 25.0, 48.0]  # from the first to the last
    llama = small(config_of("meta-llama/Llama-3.1-8B")).rope_parameters
    assert llama == config_of("meta-llama/Llama-3.1-8B").rope_parameters


def test_layers_that_stand_far_apart_are_kept_too() -> None:
    values = {
        "hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 40,
        "layer_types": ["linear"] * 30 + ["full"] + ["linear"] * 9,
    }  # fmt: skip
    made = smaller_values(values)
    assert made["layer_types"] == ["linear", "linear", "full"]
    assert made["num_hidden_layers"] == 3


def test_the_same_stand_in_is_made_whenever_it_is_asked_for(tmp_path: Path) -> None:
    source = make_model_folder(tmp_path / "source")
    state = torch.get_rng_state()
    made = [make_stand_in(source, tmp_path / name) for name in ("a", "b")]
    weights = [(one.folder / "model.safetensors").read_bytes() for one in made]
    assert weights[0] == weights[1] != (source / "model.safetensors").read_bytes()
    assert torch.equal(state, torch.get_rng_state())
    assert (made[0].layers, made[0].width, made[0].rows) == ((2, 2), (32, 32), 287)
    assert (made[0].folder / "tokenizer.json").exists()
    assert AutoConfig.from_pretrained(made[0].folder).max_position_embeddings == 256


def test_a_model_that_cannot_be_small_is_named(tmp_path: Path) -> None:
    source = make_model_folder(tmp_path / "source")
    config = AutoConfig.from_pretrained(source)
    config.vocab_size = 500_000_000
    config.save_pretrained(source)
    with pytest.raises(UserError, match=r"config\.json: a small model .* cannot be made"):
        make_stand_in(source, tmp_path / "made")
