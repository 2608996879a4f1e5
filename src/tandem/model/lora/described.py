"""A model with an adapter as its configuration describes it, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tandem.data.tokenize.vocabulary import AddedTokens
from tandem.model.added_tokens import make_missing_rows, make_rows
from tandem.model.lora.adapter import LoraWeights, added_ids_of_folder
from tandem.model.lora.targets import refused_modules
from tandem.model.model_folder import model_without_weights
from tandem.recipe.lora_settings import LoraSettings


def described_adapter(config: Any, lora: LoraSettings, added: AddedTokens | None = None) -> Any:
    """The model of a transformers configuration with an adapter, on torch's meta device.

    `added` are tokens whose embeddings are trained. Raises UserError for settings that do not fit
    the model: what a stage would find once it has loaded the weights.
    """
    model = model_without_weights(config)
    if added:
        make_rows(model, added)
    if lora.start is not None:
        make_missing_rows(model, added_ids_of_folder(Path(lora.start)))
    return LoraWeights(lora).attach(
        model, unreached=refused_modules(model), added_ids=added.ids if added else ()
    )
