"""Loads models with their weights: whole ones, bases of adapters, and adapters on their bases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from tandem.errors import UserError
from tandem.model.base_model import find_base
from tandem.model.companion_files import load_combined_tokenizer
from tandem.model.cpu.stored_weights import KEPT, kept
from tandem.model.lora.adapter_config import is_adapter
from tandem.model.lora.targets import unreached_layers
from tandem.model.model_folder import (
    check_whole,
    first_line,
    load_config,
    load_tokenizer,
    model_folder,
    model_without_weights,
)
from tandem.model.prepare_model import AFTER_LOADING, WITH_ADAPTER, Preparation, prepare_model
from tandem.model.quantize import Quantizer, read_record
from tandem.model.read_model import read_in_layers, read_model
from tandem.model.trained_weights import Log
from tandem.model.weight_files import read_headers
from tandem.runtime.device import Device
from tandem.runtime.host_memory import give_back_now

# The share of free memory up to which float32 weights leave enough for what is computed.
_COMFORTABLE = 0.5
_QUANTIZED_BITS = 5  # what a weight in 4 bits takes with its share of scales, at most


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
    """A causal language model in evaluation mode.

    On a CPU, float32 weights that would take much of the memory stay as narrow as they are stored,
    if they may; the results are the same, and `log` is told. To another device, and into 4 bits, a
    model is read layer by layer, so that the host's memory never has all of it.

    Args:
        folder: of the model.
        dtype: of the weights, and of products with quantised ones.
        device: where the model computes.
        quantization: nf4 puts the linear layers in 4 bits.
        rounded_from: of those layers, before; None: `dtype`.
        may_stay_stored: whether the weights may have other dtypes than `dtype`.

    Raises UserError for files that cannot be read, for a model whose files lack a weight, which
    transformers would fill with random numbers, and for one that does not fit into memory.
    """
    config, place = load_config(folder), torch.device(device)
    described = model_without_weights(config, folder)
    check_whole(folder, described)
    prequantized = _quantized_already(config)
    if quantization and prequantized:
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
    check_fits(
        folder, described, dtype=dtype, stored=stored, device=place, quantization=quantization
    )
    if quantization is not None:
        model = _in_4_bits(folder, described, dtype, place, rounded_from or dtype)
    elif stored is not None or (place.type != "cpu" and not prequantized):
        model = read_model(folder, config, dtype=dtype, device=place, stored=stored is not None)
    else:
        model = _loaded(folder, dtype).to(place)
    return prepare_model(model, AFTER_LOADING, Preparation(stored=stored is not None))


def load_in_layers(folder: Path, *, dtype: torch.dtype, processes: int) -> Any:
    """A model for an engine that shards: layers stay on disk, see `read_model.read_in_layers`.

    Each of so many processes will have its share of the weights, in `dtype`. Raises UserError as
    `load_model` does.
    """
    config = load_config(folder)
    described = model_without_weights(config, folder)
    check_whole(folder, described)
    host = torch.device("cpu")
    check_fits(folder, described, dtype=dtype, device=host, processes=processes)
    if _quantized_already(config):  # its maker's library reads it
        model = _loaded(folder, dtype)
    else:
        model = read_in_layers(folder, config, dtype=dtype)
    return prepare_model(model, AFTER_LOADING, Preparation())


def _in_4_bits(
    folder: Path, described: Any, dtype: torch.dtype, device: torch.device, source: torch.dtype
) -> Any:
    """A model that is quantised as it is read: one layer at a time is there in its own dtype."""
    kept = unreached_layers(described)
    made: list[Quantizer] = []

    def quantized(model: Any, modules: Sequence[nn.Module]) -> None:
        if not made:
            made.append(Quantizer(model, source=source, compute=dtype, device=device, kept=kept))
        made[0].quantize(modules)
        if len(modules) > 1:  # a layer, whose own weights are gone now
            give_back_now()

    host = torch.device("cpu")
    model = read_model(folder, described.config, dtype=dtype, device=host, filled=quantized)
    made[0].finish()
    return model.to(device)


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


def _quantized_already(config: Any) -> bool:
    return getattr(config, "quantization_config", None) is not None


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stored_dtype(
    folder: Path, config: Any, dtype: torch.dtype, device: torch.device | str
) -> torch.dtype | None:
    """The narrow dtype that weights are to stay in, None where they are widened as they load."""
    place = torch.device(device)
    if place.type != "cpu" or dtype != torch.float32:
        return None
    if _quantized_already(config) or config.model_type not in KEPT:
        return None
    sizes: Counter[str] = Counter()
    for header in read_headers(folder).values():
        sizes[header.dtype] += math.prod(header.shape)
    narrow = {"BF16": torch.bfloat16, "F16": torch.float16}.get(sizes.most_common(1)[0][0])
    wide = sizes.total() * dtype.itemsize
    return narrow if wide > _COMFORTABLE * Device(place, dtype).free_memory() else None


def check_fits(
    folder: Path,
    described: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    stored: torch.dtype | None = None,
    quantization: str | None = None,
    processes: int = 1,
) -> None:
    """Raise UserError for a model whose weights take more memory than is free; see `load_model`.

    `described` is the model without weights, `stored` the dtype of weights that stay narrow;
    `processes` share the weights.
    """
    taken = _bytes_taken(described, stored or dtype, dtype, quantization) // processes
    free = Device(device, dtype).free_memory()
    if taken > free:
        form = quantization or _named(stored or dtype)
        form += f", shared by {processes} processes" if processes > 1 else ""
        where = "of memory" if device.type == "cpu" else f"on {device}"
        raise UserError(
            f"{folder} takes {taken / 1e9:.1f} GB in {form}, and {free / 1e9:.1f} GB {where} are "
            "free for this process. Free some, start fewer processes, or take less: a narrower "
            "dtype, `quantization: nf4` for training, an engine that shards (fsdp2, "
            "deepspeed-zero3), or a smaller model."
        )


def _bytes_taken(
    model: Any, dtype: torch.dtype, widest: torch.dtype, quantization: str | None
) -> int:
    """What a model's weights take: matrices of layers in `dtype` or in 4 bits, others `widest`."""
    head = model.get_output_embeddings()
    bits = {}
    for module in model.modules():
        if quantization is not None and type(module) in (nn.Linear, Conv1D) and module is not head:
            bits[module.weight] = _QUANTIZED_BITS
        elif kept(module):
            bits[module.weight] = 8 * dtype.itemsize
    wide = 8 * widest.itemsize
    return sum(weight.numel() * bits.get(weight, wide) for weight in model.parameters()) // 8


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
