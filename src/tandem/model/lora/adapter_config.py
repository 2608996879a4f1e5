"""The configuration of a saved adapter: what kind it is, and whether tandem takes it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from tandem.errors import UserError
from tandem.model.model_folder import adapters_inside
from tandem.storage.atomic_files import read_json_object, require_spelled

CONFIG = "adapter_config.json"
WITH_PEFT = (
    "Merge it with peft (AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()) and "
    "name the merged folder"
)
# Settings with which an adapter is more than sums of low rank, or acts on some inputs alone.
_MORE = {
    "lora_bias": "has biases of its own",
    "layer_replication": "repeats layers of its base",
    "alora_invocation_tokens": "acts only behind its invocation tokens (aLoRA)",
    "use_qalora": "was trained with QA-LoRA, on groups of inputs",
    "use_bdlora": "was trained with BD-LoRA, in blocks",
    "arrow_config": "is a router between adapters (Arrow)",
    "kasa_config": "was trained with KaSA, which cuts a part off its base",
    "velora_config": "was trained with VeLoRA",
    "monteclora_config": "was trained with MonteCLoRA, which draws random numbers",
    "megatron_config": "was trained on Megatron's parallel layers",
}
# Initialisations that take a part out of the base, which cannot be computed again.
_LOST = ("pissa_niter_", "corda", "lora_ga", "loftq")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter's configuration."""
    return (folder / CONFIG).is_file()


def read_config(adapter: Path) -> Any:
    """The peft configuration of an adapter folder; UserError unless it is a plain low-rank one."""
    path = adapter / CONFIG
    values = read_config_values(adapter)
    peft = _peft()
    _refuse(adapter, values)
    try:
        with warnings.catch_warnings():
            # Keys that peft does not know were checked above.
            warnings.filterwarnings("ignore", message="Unexpected keyword arguments")
            return peft.PeftConfig.from_pretrained(str(adapter))
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be used: {error}. Copy the adapter again.") from None


def _peft() -> Any:
    """Import peft, after bitsandbytes, whose messages it would print."""
    from tandem.model.quantize import load_bitsandbytes

    load_bitsandbytes()
    return import_module("peft")


def read_config_values(adapter: Path) -> dict[str, Any]:
    """The values of adapter_config.json, unchecked; UserError for none, or for no JSON object."""
    path = adapter / CONFIG
    if not path.exists():
        raise UserError(
            f"{adapter} is no adapter folder: it has no {CONFIG}{adapters_inside(adapter)}"
        )
    require_spelled(adapter)
    return read_json_object(path, "Copy the adapter again.")


def _refuse(adapter: Path, values: Mapping[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{adapter} is an adapter of type {kind}; tandem takes LoRA adapters. {WITH_PEFT}."
        )
    if values.get("bias", "none") != "none":
        raise UserError(f"{adapter} trained biases as well (bias {values['bias']!r}). {WITH_PEFT}.")
    for key, does in _MORE.items():
        if values.get(key):
            raise UserError(
                f"{adapter} {does} ({key} {json.dumps(values[key])[:60]}), which is more than a "
                f"sum of low rank. {WITH_PEFT}."
            )
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_LOST):
        raise UserError(
            f"{adapter} was trained on a base that its initialisation had changed "
            f"(init_lora_weights {start!r}), and that cannot be computed again. Convert it where "
            "it was trained, with peft's save_pretrained(OUT, "
            "path_initial_model_for_weight_conversion=INITIAL), or merge it into the changed base "
            "that was saved there, with init_lora_weights set to true in "
            f"{CONFIG}"
        )
    why = ""
    if not (_is_number(values.get("lora_alpha", 8)) and _is_number(values.get("r", 8))):
        why = f"lora_alpha is {values.get('lora_alpha')!r} and r {values.get('r')!r}"
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
            why = why or f"{key} is {pattern!r}"
    if why:
        raise UserError(f"{adapter / CONFIG} cannot be used: {why}. Copy the adapter again.")
    _refuse_unknown(adapter, values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _refuse_unknown(adapter: Path, values: Mapping[str, Any]) -> None:
    """Raise UserError for a setting of a newer peft that is on, and that this one would ignore."""
    names = {field.name for field in fields(_peft().LoraConfig)}
    known = names | {"peft_version", "runtime_config"}
    for key, value in values.items():
        if key not in known and (value is True or (value and isinstance(value, str | list | dict))):
            raise UserError(
                f"{adapter / CONFIG} has {key} {json.dumps(value)[:60]}, which the installed peft "
                f"does not know (it was written by peft {values.get('peft_version', 'unknown')}). "
                "Update peft, or merge the adapter with the peft that wrote it"
            )
