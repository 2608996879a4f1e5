"""Whether the adapter that a stage is to train goes with its base, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from tandem.errors import UserError
from tandem.model.base_model import BaseModelInfo, check_weights
from tandem.model.lora.adapter import added_ids_of_folder
from tandem.model.lora.adapter_folder import require_plain
from tandem.model.lora.described import described_adapter
from tandem.model.lora.started import started_config
from tandem.model.quantize import read_record
from tandem.recipe.run_settings import RunSettings
from tandem.recipe.training_settings import TrainingSettings
from tandem.storage.hashing import hash_weights

# Settings of an adapter that are not checked on a model without weights first.
_PLAIN = frozenset({"rank", "alpha", "dropout", "rslora", "plus_ratio"})


def check_start(
    run: RunSettings, section: TrainingSettings, info: BaseModelInfo, *, weights: bool = True
) -> None:
    """Raise UserError for an adapter to go on with (`lora.from`) that is not one of this base.

    It was trained on other weights (if there are `weights`), on a base in 4 bits where this one is
    not, or with the rows of other tokens; or the settings say what it is not.
    """
    if section.lora.start is None:
        return

    folder = Path(section.lora.start)
    require_plain(folder)
    started_config(section.lora)
    if weights:
        check_started_on(section, info.name, info.folder)
    record = read_record(folder)
    if record is not None and run.quantization != record.format:
        raise UserError(
            f"lora.from: {folder} was trained on a base in 4 bits; set quantization: "
            f"{record.format}, or merge it and train a new adapter on the merged model"
        )
    rows, named = added_ids_of_folder(folder), sorted(info.added.ids)
    if rows != named:
        raise UserError(
            f"lora.from: {folder} trains the rows of the tokens {info.named(rows)}, and this stage "
            f"those of {info.named(named)}: name the same in added_tokens"
        )


def check_adapter(section: TrainingSettings, info: BaseModelInfo) -> None:
    """Raise UserError for settings of an adapter that do not fit the model, before it is loaded.

    Plain ones are checked where the adapter is put into the model.
    """
    if not section.lora.model_fields_set <= _PLAIN:
        described_adapter(info.config, section.lora, info.added)


def check_started_on(section: TrainingSettings, name: str, base: Path) -> None:
    """Raise UserError for an adapter to go on with that was trained on other weights than a base's.

    `name` is what the run calls the base.
    """
    if section.lora.start is not None:
        way_out = "Name the model that it was trained on, or train a new adapter."
        check_weights(Path(section.lora.start), name, hash_weights(base), f"lora.from: {way_out}")
