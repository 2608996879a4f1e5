"""Loads models with their weights: whole ones, bases of adapters, and adapters on their bases."""

from __future__ import annotations

import math
from collections import Counter
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
from tandem.model.trained_weights import Log
from tandem.model.weight_files import read_headers
from tandem.runtime.device import Device

# The share of free memory up to which float32 weights leave enough for what is computed.
_COMFORTABLE = 0.5
_QUANTIZED_BITS = 5  # a weight's share of a model in 4 bits, its wider embeddings included


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quantization: str | None = None,
    rounded_from: torch.dtype | None = None,
    may_stay_stored: bool = True,
    log: Log = lambda _: None,
) -> Any:
    """A causal language model in evaluation mode; see `Preparation` for the arguments.

    On a CPU, float32 weights that would take much of the memory stay as narrow as they are stored,
    if they may; the results are the same, and `log` is told.

    Raises UserError for files that cannot be read, for a model whose files lack a weight, which
    transformers would fill with random numbers, and for one that does not fit into memory.
    """
    config = load_config(folder)
    check_whole(folder, config)
    if quantization and getattr(config, "quantization_config", None) is not None:
        raise UserError(
            f"quantization: {folder} is quantised already; name the model that it was made of"
        )
    widens = may_stay_stored and quantization is None
    stored = stored_dtype(folder, config, dtype, device) if widens else None
    if stored is not None:
        log(
            f"weights stay {_named(stored)} in memory, as they are stored, and are widened where "
            "they are used: the results are those of float32 weights"
        )
    check_fits(folder, config, dtype=stored or dtype, device=device, quantization=quantization)
    preparation = Preparation(
        dtype=dtype,
        device=device,
        quantization=quantization,
        rounded_from=rounded_from,
        stored=stored is not None,
    )
    return prepare_model(_loaded(folder, stored or dtype), AFTER_LOADING, preparation)


def _loaded(folder: Path, dtype: torch.dtype) -> Any:
    """A folder's model on the CPU, all its weights from its files."""
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
    return model.eval()


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stored_dtype(
    folder: Path, config: Any, dtype: torch.dtype, device: torch.device | str
) -> torch.dtype | None:
    """The narrow dtype that weights are to stay in, None where they are widened as they load."""
    place = torch.device(device)
    quantized = getattr(config, "quantization_config", None) is not None
    if place.type != "cpu" or dtype != torch.float32 or quantized:
        return None
    sizes: Counter[str] = Counter()
    for header in read_headers(folder).values():
        sizes[header.dtype] += math.prod(header.shape)
    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}.get(sizes.most_common(1)[0][0])
    wide = sizes.total() * dtype.itemsize
    return narrow if wide > _COMFORTABLE * Device(place, dtype).free_memory() else None


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
            where = "of memory" if each == host else f"on {each}"
            raise UserError(
                f"{folder} takes {needed / 1e9:.1f} GB in {_named(dtype)}, and "
                f"{free / 1e9:.1f} GB {where} are free for this process. Free some, start fewer "
                "processes, or take less: a narrower dtype, `quantization: nf4` for training, or "
                "a smaller model."
            )


def load_base(
    base: Path,
    adapter: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    log: Log = lambda _: None,
) -> Any:
    """The base as a saved adapter saw it: quantised, if it was."""
    record = read_record(adapter)
    form, source = (record.format, record.torch_dtype) if record else (None, None)
    return load_model(
        base, dtype=dtype, device=device, quantization=form, rounded_from=source, log=log
    )


def load_adapter(model: Any, folder: Path) -> Any:
    """A loaded model with a saved adapter; see `prepare_model.WITH_ADAPTER`."""
    return prepare_model(model, WITH_ADAPTER, Preparation(adapter=folder))


def load_for_inference(path: str, device: str, log: Log = lambda _: None) -> tuple[Any, Any]:
    """Model and tokenizer for generation, from a model folder, an adapter folder or a Hub id.

    An adapter is loaded on top of the base its adapter_config.json names. Numbers are float32 on
    CPU and MPS, bfloat16 elsewhere; see `load_model`.
    """
    dtype = torch.float32 if torch.device(device).type in ("cpu", "mps") else torch.bfloat16
    folder = model_folder(path)
    if is_adapter(folder):
        base = find_base(folder)
        tokenizer = load_combined_tokenizer(base, folder)
        model = load_base(base, folder, dtype=dtype, device=device, log=log)
        return load_adapter(model, folder), tokenizer
    return load_model(folder, dtype=dtype, device=device, log=log), load_tokenizer(folder)
