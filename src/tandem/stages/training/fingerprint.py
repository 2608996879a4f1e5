"""What a training stage begins with: its model, if that fits, and all its result depends on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.data.resolve_sources import data_identity
from tandem.data.tokenize.chat_template import ChatTemplate, resolve_template
from tandem.data.tokenize.vocabulary import AddedTokens, add_tokens
from tandem.model.added_tokens import embedding_names
from tandem.model.lora.adapter import (
    LoraWeights,
    adapted_weights,
    check_targets,
    refused_modules,
)
from tandem.model.model_folder import (
    check_context,
    check_unquantized,
    load_config,
    load_tokenizer,
    model_without_weights,
)
from tandem.model.weight_files import check_sums
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import TrainingSettings
from tandem.stages.training.context import TrainContext
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


def fingerprint(context: TrainContext) -> dict[str, Any]:
    """All that the stage's result depends on, as its manifest has it."""
    base, run, template, added = context.base, context.job.run, context.template, context.added
    held_out = context.held_out
    return {
        "model": {
            "weights": hash_weights(base),
            "config": hash_file(base / "config.json"),
            **({"quantization": run.quantization} if run.quantization else {}),
            # The reference of DPO depends on them, too.
            **({"added_tokens": dict(added.new)} if added.new else {}),
            **({"trained_tokens": dict(added.known)} if added.known else {}),
        },
        "data": data_identity(context.sources),
        **({"held_out": data_identity(held_out)} if held_out else {}),
        "chat_template": {
            "name": template.name,
            "hash": hash_bytes(template.source.encode()),
            **({"named": hash_json(template.named)} if template.named else {}),
        },
        "settings": context.job.settings.model_dump(mode="json", exclude=_NOT_MATHEMATICS),
        "seed": run.seed,
        "dtype": context.engine.device.dtype_name,
    }


def model_side(
    base: Path, run: RunSettings, max_length: int, *, weights: bool = True
) -> tuple[Any, Any, ChatTemplate, AddedTokens]:
    """The model's configuration, tokenizer and template, and the tokens that are trained.

    Without `weights` it need have none.
    """
    config = load_config(base, weights=weights)
    check_unquantized(base, config)
    check_context(config, max_length, base)
    tokenizer = load_tokenizer(base)
    added = add_tokens(tokenizer, run.added_tokens)
    return config, tokenizer, resolve_template(tokenizer, run.chat_template), added


def check_base(folder: Path, sections: Mapping[str, TrainingSettings], *, weights: bool) -> None:
    """Raise UserError if a base model lacks context, or layers for adapters, for a training stage.

    So it is for a base that is quantised already, and for one into whose files no adapter could be
    merged.

    Args:
        folder: the base model's.
        sections: the training stages by name, all of them on models of the base's architecture.
        weights: whether the folder must hold weights.
    """
    config = load_config(folder, weights=weights)
    check_unquantized(folder, config)
    for name, section in sections.items():
        check_context(config, section.max_length, folder, f"{name}.max_length")
    for name, section in sections.items():
        targets = section.lora.target_modules
        if not isinstance(targets, str):
            model = model_without_weights(config)
            key = f"{name}.lora.target_modules"
            check_targets(model, targets, refused_modules(model), key)
        if weights:
            _check_sums(folder, config, section)


def _check_sums(folder: Path, config: Any, section: TrainingSettings) -> None:
    """Raise UserError if a stage's adapter could not be merged into the base's files."""
    model, plain = model_without_weights(config), model_without_weights(config)
    adapted = LoraWeights(section.lora).attach(model, unreached=refused_modules(model))
    rows = [f"{name}.weight" for name in embedding_names(plain)]
    check_sums(folder, plain, [*adapted_weights(adapted), *rows])
