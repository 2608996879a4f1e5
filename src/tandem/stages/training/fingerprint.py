"""What the result of a training stage depends on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.data.resolve_sources import data_identity
from tandem.data.tokenize.added_tokens import AddedTokens, add_tokens
from tandem.data.tokenize.chat_template import ChatTemplate, resolve_template
from tandem.model.model_folder import check_context, check_unquantized, load_config, load_tokenizer
from tandem.recipe.data_source import DataSource
from tandem.recipe.run_settings import Runtime
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.device import Device
from tandem.storage.hashing import hash_bytes, hash_file, hash_json, hash_weights

# Settings that say when to look or save, not what is computed.
_NOT_MATHEMATICS: Any = {
    "data": True,
    "logging_steps": True,
    "save_steps": True,
    "save_total_limit": True,
    "gradient_checkpointing": True,
    "max_dropped": True,
    "validation": {"data"},
}


def resolved_inputs(
    base: Path,
    sources: list[DataSource],
    held_out: list[DataSource],
    settings: TrainingSettings,
    chat_template: str | None,
    seed: int,
    runtime: Runtime,
    device: Device,
    added_tokens: Sequence[str] = (),
) -> tuple[Any, Any, ChatTemplate, AddedTokens, dict[str, Any]]:
    """`model_side`, and all that the result depends on."""
    config, tokenizer, template, added = model_side(base, settings, chat_template, added_tokens)
    inputs = {
        "model": {
            "weights": hash_weights(base),
            "config": hash_file(base / "config.json"),
            **({"quantization": runtime.quantization} if runtime.quantization else {}),
            # The reference of DPO depends on them, too.
            **({"added_tokens": dict(added.new)} if added.new else {}),
            **({"trained_tokens": dict(added.known)} if added.known else {}),
        },
        "data": data_identity(sources),
        **({"held_out": data_identity(held_out)} if held_out else {}),
        "chat_template": {
            "name": template.name,
            "hash": hash_bytes(template.source.encode()),
            **({"named": hash_json(template.named)} if template.named else {}),
        },
        "settings": settings.model_dump(mode="json", exclude=_NOT_MATHEMATICS),
        "seed": seed,
        "dtype": device.dtype_name,
    }
    return config, tokenizer, template, added, inputs


def model_side(
    base: Path,
    settings: TrainingSettings,
    chat_template: str | None,
    added_tokens: Sequence[str] = (),
    *,
    weights: bool = True,
) -> tuple[Any, Any, ChatTemplate, AddedTokens]:
    """The model's configuration, tokenizer and template, and the tokens that are trained.

    Without `weights` it need have none.
    """
    config = load_config(base, weights=weights)
    check_unquantized(base, config)
    check_context(config, settings.max_length, base)
    tokenizer = load_tokenizer(base)
    added = add_tokens(tokenizer, added_tokens)
    return config, tokenizer, resolve_template(tokenizer, chat_template), added
