"""What a stage's result depends on, and whether the stage is finished, without loading torch.

A stage that is not finished runs as usual, and asks again. So does one whose tokenizer only
transformers can read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console

from tandem.data.resolve_sources import (
    check_format,
    data_identity,
    held_out_sources,
    resolve_sources,
)
from tandem.data.sources.rows import is_local, local_files
from tandem.data.tokenize.chat_template import ChatTemplate, resolve_template
from tandem.data.tokenize.light_tokenizer import read_light_tokenizer
from tandem.data.tokenize.vocabulary import AddedTokens, add_tokens
from tandem.integrations.choose import device_names, idle_settings
from tandem.losses.custom import is_custom, lasting_name
from tandem.model.base_model import trained_weights
from tandem.model.lora.adapter_config import read_config_values
from tandem.model.model_folder import (
    QUANTIZATION,
    check_lengths,
    model_folder,
    on_hub,
    require_model,
)
from tandem.recipe.data_source import DataSource
from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.jobs import MergeJob, TrainingJob
from tandem.recipe.lora_settings import FIXED
from tandem.recipe.training_settings import TrainingSettings
from tandem.runtime.console import log, say_finished
from tandem.runtime.launch import launched
from tandem.storage.folder_lock import check_free, folder_lock
from tandem.storage.hashing import hash_bytes, hash_file, hash_json, hash_weights
from tandem.storage.manifest import check_made, is_finished, open_stage
from tandem.storage.run_folder import run_of

# Settings that do not change what is computed.
_NOT_MATHEMATICS: Any = {
    "data": True,
    "logging_steps": True,
    "save_steps": True,
    "save_total_limit": True,
    "gradient_checkpointing": True,
    "max_dropped": True,
    "samples": True,
    "validation": {"data"},
    "lora": {"from"},
}
# What an adapter's configuration says of its base, which is hashed itself.
_PLACES = frozenset({"base_model_name_or_path", "revision"})
# Settings of the first version. Those that came later count only where they are not their default,
# so that stages of earlier versions are recognised.
_OF_THE_FIRST_VERSION = frozenset({
    "batch_size", "epochs", "max_steps", "learning_rate", "lr_scheduler", "warmup_steps",
    "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "lora", "max_length", "too_long", "max_prompt_length", "validation", "keep", "best_metric",
    "on_bad_record", "loss_on", "beta",
    # of `lora`
    "rank", "alpha", "dropout", "target_modules",
    # of `validation`
    "split", "fraction", "steps",
})  # fmt: skip


def training_inputs(
    job: TrainingJob,
    base: Path,
    template: ChatTemplate,
    added: AddedTokens,
    data: tuple[list[DataSource], list[DataSource]],
    dtype: str,
) -> dict[str, Any]:
    """Collect all that a training stage's result depends on, for its manifest.

    Args:
        job: what is asked for.
        base: folder of the model that it starts from.
        template: the chat template in force.
        added: tokens whose embeddings are trained.
        data: the data sets to train on, and those that are only scored.
        dtype: of the weights, by name.
    """
    run, (sources, held_out) = job.run, data
    return {
        "model": {
            "weights": hash_weights(base),
            "config": hash_file(base / "config.json"),
            **({"quantization": run.quantization} if run.quantization else {}),
            # DPO's reference depends on them, too.
            **({"added_tokens": dict(added.new)} if added.new else {}),
            **({"trained_tokens": dict(added.known)} if added.known else {}),
            **_started(job.settings),
        },
        "data": data_identity(sources),
        **({"held_out": data_identity(held_out)} if held_out else {}),
        "chat_template": {
            "name": template.name,
            "hash": hash_bytes(template.source.encode()),
            **({"named": hash_json(template.named)} if template.named else {}),
        },
        "settings": settings_that_count(job.settings),
        "seed": run.seed,
        "dtype": dtype,
    }


def _started(settings: TrainingSettings) -> dict[str, Any]:
    """The adapter that training goes on with, by content; it is DPO's reference with the model."""
    if settings.lora.start is None:
        return {}
    folder = Path(settings.lora.start)
    values = read_config_values(folder)
    # where its base was, which may have been moved
    said = {key: value for key, value in values.items() if key not in _PLACES}
    return {"adapter": {"weights": hash_weights(folder), "config": hash_json(said)}}


def settings_that_count(settings: TrainingSettings) -> dict[str, Any]:
    """The settings that change what is computed, by key; functions go by their text."""

    def keep(section: BaseModel, dumped: dict[str, Any]) -> dict[str, Any]:
        kept = {}
        for key, value in dumped.items():
            own = getattr(section, key)
            if key not in _OF_THE_FIRST_VERSION and own == type(section).model_fields[key].default:
                continue
            kept[key] = keep(own, value) if isinstance(own, BaseModel) else value
        return kept

    exclude = _NOT_MATHEMATICS
    if settings.lora.start is not None:
        exclude = exclude | {"lora": {"from", *FIXED}}
    kept = keep(settings, settings.model_dump(mode="json", exclude=exclude))
    if isinstance(settings, DpoSettings) and any(map(is_custom, settings.losses)):
        named = {lasting_name(name): weight for name, weight in settings.losses.items()}
        kept["loss"] = next(iter(named)) if isinstance(settings.loss, str) else named
    return kept


def merge_inputs(job: MergeJob, base: Path) -> dict[str, Any]:
    """Collect all that a merge's result depends on; `base` is the folder of the base model."""
    quantized = job.adapter / QUANTIZATION
    return {
        "base": {"weights": hash_weights(base), "config": hash_file(base / "config.json")},
        "adapter": hash_weights(job.adapter),
        "dtype": job.settings.dtype,
        "chat_template": job.run.chat_template,
        **({"quantization": hash_file(quantized)} if quantized.exists() else {}),
    }


def training_is_finished(stage: str, job: TrainingJob, console: Console) -> bool:
    """Whether the training stage of that name is finished with the job's inputs; says so if it is.

    Raises UserError for mistakes that need no weights: a folder that another process holds, data
    and models on this machine that are not there, lengths beyond the model's context, and a
    finished stage with other inputs.
    """
    if launched().count > 1:
        return False
    run, settings = job.run, job.settings
    check_free(job.folder)
    if not on_hub(run.model):
        check_lengths(model_folder(run.model), {"max_length": settings.max_length})
    for source in settings.data:
        check_format(source)
        if is_local(source.path):
            local_files(source.path, source.split)
    if not is_finished(job.folder):
        return False
    device, folder, beside = device_names(run), model_folder(run.model), run_of(job.folder)
    tokenizer = read_light_tokenizer(folder)
    if tokenizer is None:
        return False
    sources = resolve_sources(settings.data, beside, run.seed)
    held_out = held_out_sources(settings, sources, beside, run.seed)
    check_made(folder, lambda text: log(console, f"{stage}: {text}"))
    added = add_tokens(tokenizer, run.added_tokens)
    template = resolve_template(tokenizer, run.chat_template)
    data = (sources, held_out)
    inputs = training_inputs(job, folder, template, added, data, device.dtype_name)
    if not _is_finished_with(job.folder, stage, inputs):
        return False
    for notice in idle_settings(run, device, settings.optimizer):
        log(console, f"{stage}: {notice}")
    say_finished(console, stage, job.folder)
    return True


def merge_is_finished(job: MergeJob, console: Console) -> bool:
    """Whether a merge is finished with the job's inputs; says so if it is.

    Raises UserError for a base that is no model, an adapter folder without an adapter, an output
    folder that another process holds, and a finished merge of something else.
    """
    check_free(job.folder)
    base = model_folder(job.run.model)
    require_model(base)
    read_config_values(job.adapter)
    if not is_finished(job.folder):
        return False
    for folder in (base, job.adapter):
        check_made(folder, lambda text: log(console, f"merge: {text}", style="yellow"))
    inputs = merge_inputs(job, base)
    if not job.force and trained_weights(job.adapter) not in (None, inputs["base"]["weights"]):
        return False  # refused, with the reason, by the merge itself
    if not _is_finished_with(job.folder, "merge", inputs):
        return False
    say_finished(console, "merge", job.folder)
    return True


def _is_finished_with(folder: Path, stage: str, inputs: Mapping[str, Any]) -> bool:
    """Whether a stage is finished; raises UserError for other inputs, and for changed outputs."""
    with folder_lock(folder):
        return open_stage(folder, stage, inputs).state == "finished"
