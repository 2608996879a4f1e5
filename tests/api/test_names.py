"""Keyword arguments: tandem's own names, TRL's and peft's, and all others."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import tandem
from tandem.api.make_options import options_module
from tandem.api.names import NOT_AS_PEFT, NOT_AS_TRL, SAME_AS_PEFT, SAME_AS_TRL
from tandem.errors import UserError
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.lora_settings import LoraSettings
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import SftSettings

# Names that TRL's configurations have for the same settings; a new one is looked at before it is
# added here.
THE_SAME = {
    "adam_beta1", "adam_beta2", "adam_epsilon", "beta", "desirable_weight", "discopop_tau",
    "f_alpha_divergence_coef", "undesirable_weight",
    "f_divergence_type", "gradient_checkpointing", "label_smoothing", "ld_alpha", "learning_rate",
    "logging_steps", "max_grad_norm", "max_length", "max_steps", "output_dir", "save_steps",
    "save_total_limit", "seed", "warmup_steps", "weight_decay",
}  # fmt: skip
OURS = {**SftSettings.model_fields, **DpoSettings.model_fields, **RunSettings.model_fields}


@pytest.fixture(scope="module")
def trls() -> set[str]:
    """The settings of TRL's configurations, and the arguments of its trainers.

    They are read from the sources, because TRL takes many seconds to import.
    """
    (trl,), (transformers,) = (
        find_spec(name).submodule_search_locations  # type: ignore[union-attr]
        for name in ("trl", "transformers")
    )
    files = [Path(transformers, "training_args.py"), Path(trl, "trainer", "base_config.py")]
    for kind in ("sft", "dpo", "kto"):
        files += [Path(trl, "trainer", f"{kind}_{what}.py") for what in ("config", "trainer")]
    return {name for file in files for name in _names_of(ast.parse(file.read_text()))}


_CLASSES = ("Config", "TrainingArguments", "Trainer")
# Arguments of trainers that are not what the settings of the same names are.
_OBJECTS = {"model", "callbacks"}


def _names_of(module: ast.Module) -> Iterator[str]:
    """The fields of configurations, and the arguments of trainers, in a module."""
    for one in module.body:
        if not isinstance(one, ast.ClassDef) or not one.name.endswith(_CLASSES):
            continue
        for part in one.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                yield part.target.id
            elif isinstance(part, ast.FunctionDef) and part.name == "__init__":
                yield from (argument.arg for argument in part.args.args)


def test_every_name_of_trls_is_a_name_of_trls(trls: set[str]) -> None:
    assert SAME_AS_TRL.keys() <= trls
    assert NOT_AS_TRL.keys() <= trls
    assert set(SAME_AS_TRL.values()) <= OURS.keys()
    assert not (SAME_AS_TRL.keys() | NOT_AS_TRL.keys()) & OURS.keys()
    assert (trls & OURS.keys()) - _OBJECTS == THE_SAME


def test_every_name_of_pefts_is_a_name_of_pefts() -> None:
    from peft import LoraConfig

    names = {one.name for one in dataclasses.fields(LoraConfig)}
    assert SAME_AS_PEFT.keys() | NOT_AS_PEFT.keys() <= names
    assert set(SAME_AS_PEFT.values()) <= LoraSettings.model_fields.keys()
    same = {"target_modules", "rank_pattern", "alpha_pattern", "modules_to_save"}
    assert names & LoraSettings.model_fields.keys() == same


def test_an_adapter_by_pefts_names_is_one_by_our_own(tmp_path: Path) -> None:
    theirs = tandem.LoRA(
        r=8, lora_alpha=4, lora_dropout=0.1, use_rslora=True, use_dora=True, target_modules=["q"]
    )
    ours = LoraSettings(rank=8, alpha=4, dropout=0.1, rslora=True, dora=True, target_modules=("q",))
    assert theirs == ours
    assert tandem.LoRA(start=tmp_path).start == str(tmp_path)


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"r": 8, "rank": 8}, "LoRA(): r and rank are the same setting; keep one of them"),
    ({"ranc": 8}, "LoRA() has no setting ranc. Did you mean 'rank'?"),
    ({"lora_alpa": 8}, "Did you mean 'lora_alpha'?"),
    ({"init_lora_weights": True}, "LoRA() has no init_lora_weights: write init='zero', 'pissa'"),
    ({"rank": "big"}, "LoRA(): rank is 'big', but it must be"),
    ({"target_modules": ".*_proj"}, "LoRA(): target_modules is '.*_proj', but it must be"),
)


@pytest.mark.parametrize(("given", "says"), WRONG)
def test_a_wrong_setting_of_an_adapter_is_explained(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        tandem.LoRA(**given)
    assert says in str(caught.value)


ASKED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("sft", {"per_device_train_batch_size": 2}, "has no per_device_train_batch_size: write batch_"),
    ("dpo", {"loss_type": "ipo"}, "dpo() has no loss_type: write loss, for instance loss='ipo'"),
    ("sft", {"max_lenght": 9}, "sft() has no setting max_lenght. Did you mean 'max_length'?"),
    ("sft", {"beta": 9}, "sft() has no setting beta."),
    ("dpo", {"neftune_noise_alpha": 9}, "dpo() has no setting neftune_noise_alpha."),
    ("sft", {"num_train_epochs": 1, "epochs": 1}, "num_train_epochs and epochs are the same"),
    ("sft", {"learning_rate": "fast"}, "sft(): learning_rate is 'fast', but it must be"),
    ("sft", {"seed": -1}, "sft(): seed is -1, but it must be"),
    ("sft", {"epochs": 1, "max_steps": 1}, "sft(): epochs and max_steps are both set"),
    ("dpo", {"loss": "sigmoit"}, "dpo(): loss: there is no loss 'sigmoit'. Did you mean 'sigmoid'"),
    ("dpo", {"loss": "ipo", "simpo_gamma": 0.1}, "simpo_gamma has no effect with loss"),
    ("sft", {"lora": {"rnk": 3}}, "sft(): unknown key lora.rnk; did you mean lora.rank?"),
    ("sft", {"validation": {"data": 3}}, "sft(): the data is a int; give a path, a Hub id"),
    ("sft", {"seed": {1, 2}}, "sft(): seed is [1, 2], but it must be"),
    ("sft", {"seed": object()}, "which no setting is"),
)


@pytest.mark.parametrize(("call", "given", "says"), ASKED)
def test_a_wrong_setting_is_explained_before_anything_is_read(
    call: str, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as caught:
        getattr(tandem, call)("/no/model", "/no/data.jsonl", **given)
    assert says in str(caught.value)


def test_the_types_of_keyword_arguments_are_current() -> None:
    written = Path(tandem.__file__).parent / "api" / "options.py"
    advice = "run: python -m tandem.api.make_options > src/tandem/api/options.py"
    assert written.read_text() == options_module(), advice
