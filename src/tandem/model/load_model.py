"""Loads models with their weights: whole ones, bases of adapters, and adapters on their bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from tandem.errors import UserError
from tandem.model.base_model import find_base
from tandem.model.companion_files import load_combined_tokenizer
from tandem.model.lora.adapter_config import is_adapter
from tandem.model.model_folder import (
    check_whole,
    first_line,
    load_config,
    load_tokenizer,
    model_folder,
    model_without_weights,
)
from tandem.model.prepare_model import AFTER_LOADING, WITH_ADAPTER, Preparation, prepare_model
from tandem.model.quantize import read_record
from tandem.runtime.device import Device

_QUANTIZED_BITS = 5  # a weight's share of a model in 4 bits, its wider embeddings included


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization: str | None = None,
    rounded_from: torch.dtype | None = None,
) -> Any:
    """A causal language model in evaluation mode; see `Preparation` for the arguments.

    Raises UserError for files that cannot be read, for a model whose files lack a weight, which
    transformers would fill with random numbers, and for one that does not fit into memory.
    """
    config = load_config(folder)
    check_whole(folder, config)
    check_fits(folder, config, dtype=dtype, device=device, quantization=quantization)
    if quantization and getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"quantization: {folder} is quantised already; name the model that it was made of"
        )
    # tandem draws its own progress.
    transformers_logging.disable_progress_bar()
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    # Quantised models need packages; damaged files raise any error.
    except Exception as error:
        raise UserError(f"{folder} cannot be loaded as a model: {first_line(error)}") from None
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"{folder} is not a whole model: {len(missing)} of its weights are in none of its "
            f"files ({', '.join(missing[:3])}). Copy or download it again, or correct config.json."
        )
    preparation = Preparation(
        dtype=dtype, device=device, quantization=quantization, rounded_from=rounded_from
    )
    return prepare_model(model.eval(), AFTER_LOADING, preparation)


def check_fits(
    folder: Path,
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: str | None = None,
) -> None:
    """Raise UserError for a model whose weights take more memory than is free; see `load_model`."""
    numbers = sum(weight.numel() for weight in model_without_weights(config).parameters())
    host, place = torch.device("cpu"), torch.device(device)
    # Weights are read, and quantised, on the host.
    wanted = {host: numbers * dtype.itemsize, place: numbers * dtype.itemsize}
    if quantization is not None and place != host:
        wanted[place] = numbers * _QUANTIZED_BITS // 8
    for each, needed in wanted.items():
        free = Device(each, dtype).free_memory()
        if needed > free:
            what = str(dtype).removeprefix("torch.")
            where = "of memory" if each == host else f"on {each}"
            raise UserError(
                f"{folder} takes {needed / 1e9:.1f} GB in {what}, and {free / 1e9:.1f} GB {where} "
                "are free for this process. Free some, start fewer processes, or take less: a "
                "narrower dtype, `quantization: nf4` for training, or a smaller model."
            )


def load_base(
    base: Path, adapter: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Any:
    """The base as a saved adapter saw it: quantised, if it was."""
    record = read_record(adapter)
    form, source = (record.format, record.torch_dtype) if record else (None, None)
    return load_model(base, dtype=dtype, device=device, quantization=form, rounded_from=source)


def load_adapter(model: Any, folder: Path) -> Any:
    """A loaded model with a saved adapter; see `prepare_model.WITH_ADAPTER`."""
    return prepare_model(model, WITH_ADAPTER, Preparation(adapter=folder))


def load_for_inference(path: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer for generation, from a model folder, an adapter folder or a Hub id.

    An adapter is loaded on top of the base its adapter_config.json names. Weights are float32 on
    CPU and MPS, bfloat16 elsewhere.
    """
    dtype = torch.float32 if torch.device(device).type in ("cpu", "mps") else torch.bfloat16
    folder = model_folder(path)
    if is_adapter(folder):
        base = find_base(folder)
        tokenizer = load_combined_tokenizer(base, folder)
        return load_adapter(load_base(base, folder, dtype=dtype, device=device), folder), tokenizer
    return load_model(folder, dtype=dtype, device=device), load_tokenizer(folder)
