"""Writes a GGUF file of a transformers model, one tensor in memory at a time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tandem.errors import UserError
from tandem.export.choices import FileFormat
from tandem.export.families import extra_tensors, family_of, layout_of, settings_of
from tandem.export.formats import check_range, nbytes, rows_at_once, tensor_format
from tandem.export.vocabulary import FileVocabulary
from tandem.model.read_model import ModelFolder

_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # llama.cpp's general.file_type
# A file's header is little beside its tensors, but for its vocabulary.
_HEADER_BYTES = 1 << 20
_CASTS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class FileTensor:
    """A tensor to be written: its name and format in the file, and the weight it is made of."""

    name: str
    format: str
    shape: tuple[int, ...]
    weight: str | None = None  # its name in memory; None for what is made of the configuration

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return nbytes(self.shape, self.format)


def file_names(model: Any) -> dict[str, str]:
    """What each weight of a model without weights is called in a file, by gguf's table.

    Raises UserError for a weight that the table lacks.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.config
    wanted = family_of(config).architecture
    found = next((one for one, name in MODEL_ARCH_NAMES.items() if name == wanted), None)
    if found is None:
        raise UserError(
            f"the installed package gguf does not know the architecture {wanted}. Install a newer "
            "one: pip install -U gguf"
        )
    table = get_tensor_name_map(found, config.num_hidden_layers)
    names = {}
    for weight in dict(model.named_parameters()):
        name = table.get_name(weight, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"gguf has no name for the weight {weight} of this model")
        names[weight] = name
    return names


def file_tensors(model: Any, wanted: FileFormat) -> list[FileTensor]:
    """The tensors of a file of a model without weights."""
    sizes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    tensors = [
        FileTensor(name, tensor_format(sizes[weight], wanted), sizes[weight], weight)
        for weight, name in file_names(model).items()
    ]
    made = [
        FileTensor(name, "F32", tuple(values.shape))
        for name, values in extra_tensors(model.config).items()
    ]
    return [*made, *tensors]


def file_bytes(tensors: list[FileTensor], vocabulary: FileVocabulary) -> int:
    """About how many bytes a file takes."""
    words = sum(len(word.encode()) + 20 for word in (*vocabulary.tokens, *vocabulary.merges))
    return sum(tensor.nbytes for tensor in tensors) + words + _HEADER_BYTES


def check_room(wanted: int, folder: Path) -> None:
    """Raise UserError where the disk of a folder, or of its nearest parent, has too little room."""
    there = next(place for place in (folder, *folder.parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise UserError(
            f"the file takes {wanted / 1e9:.1f} GB, and the disk of {there} has "
            f"{free / 1e9:.1f} GB free. Make room there, write to another disk, or export with "
            "--type q8_0."
        )


def write_gguf(
    path: Path,
    source: Path,
    model: Any,
    vocabulary: FileVocabulary,
    wanted: FileFormat,
    advance: Callable[[int], None] = lambda _: None,
) -> list[FileTensor]:
    """Write a file of the model in the folder `source`; returns its tensors.

    Args:
        path: of the file; what is there is replaced.
        source: a transformers model's folder.
        model: the same model without weights.
        vocabulary: from `vocabulary_of`.
        wanted: the format of matrices.
        advance: told of the bytes of each tensor that was written.

    Raises UserError for a weight that the files lack, or that the format cannot hold.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    logging.getLogger("gguf").setLevel(logging.ERROR)  # its progress, line by line
    config = model.config
    tensors = file_tensors(model, wanted)
    writer = GGUFWriter(path, family_of(config).architecture)
    _write_settings(writer, settings_of(config), wanted)
    _write_vocabulary(writer, vocabulary)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes,
            raw_dtype=GGMLQuantizationType[tensor.format],
        )  # fmt: skip
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        weights, made = ModelFolder(source, model), extra_tensors(config)
        for tensor in tensors:
            values = _values(tensor, weights, made, config)
            writer.write_tensor_data(_packed(values, tensor))
            advance(tensor.nbytes)
    finally:
        writer.close()
    return tensors


def _values(
    tensor: FileTensor, weights: ModelFolder, made: Mapping[str, Tensor], config: Any
) -> Tensor:
    """A tensor's numbers in the file's order, as wide as they are stored."""
    if tensor.weight is None:
        return made[tensor.name]
    found = weights.read([tensor.weight, *_tied(tensor.weight)])
    if not found:
        raise UserError(
            f"{weights.path} is not a whole model: {tensor.weight} is in none of its files. Copy "
            "or download it again."
        )
    values = next(iter(found.values()))
    if tuple(values.shape) != tensor.shape:
        raise UserError(
            f"{weights.path}: {tensor.weight} has shape {tuple(values.shape)} in its files, and "
            f"{tensor.shape} by its config.json"
        )
    return layout_of(config, tensor.name).to_file(values)


def _tied(weight: str) -> tuple[str, ...]:
    """Another name under which the files may have a weight."""
    return ("lm_head.weight",) if weight == "model.embed_tokens.weight" else ()


def _packed(values: Tensor, tensor: FileTensor) -> Any:
    """The bytes of a tensor in the file, made of some rows after the other.

    gguf's own function rounds to q8_0. Raises UserError for numbers that the format cannot hold.
    """
    from gguf import GGMLQuantizationType, quantize

    rows = [values] if values.dim() < 2 else values.split(rows_at_once(values.shape))
    packed = []
    for part in rows:
        check_range(part, tensor.name, tensor.format)
        if tensor.format in _CASTS:
            packed.append(part.to(_CASTS[tensor.format]).contiguous().view(torch.uint8).numpy())
        else:
            wide = part.float().contiguous().numpy()
            packed.append(quantize(wide, GGMLQuantizationType[tensor.format]))
    return packed[0] if len(packed) == 1 else np.concatenate(packed)


def _write_settings(
    writer: Any, values: Mapping[str, int | float | str], wanted: FileFormat
) -> None:
    from gguf import GGML_QUANT_VERSION

    writer.add_type("model")
    writer.add_file_type(_FILE_TYPES[wanted])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, value in values.items():
        whole = f"{writer.arch}.{key}"
        if isinstance(value, str):
            writer.add_string(whole, value)
        elif isinstance(value, float):
            writer.add_float32(whole, value)
        else:
            writer.add_uint32(whole, value)


def _write_vocabulary(writer: Any, own: FileVocabulary) -> None:
    if own.name:
        writer.add_name(own.name)
    writer.add_tokenizer_model(own.model)
    writer.add_tokenizer_pre(own.pre or "default")
    writer.add_token_list(list(own.tokens))
    writer.add_token_types(list(own.types))
    if own.scores:
        writer.add_token_scores(list(own.scores))
    if own.merges:
        writer.add_token_merges(list(own.merges))
    for index, add in (
        (own.bos, writer.add_bos_token_id),
        (own.eos, writer.add_eos_token_id),
        (own.eot, writer.add_eot_token_id),
        (own.unknown, writer.add_unk_token_id),
        (own.padding, writer.add_pad_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(own.add_bos)
    writer.add_add_eos_token(False)
    if own.model == "llama":
        writer.add_add_space_prefix(own.add_space_prefix)
    named = [{"name": name, "template": text} for name, text in own.templates.items()]
    writer.add_chat_template(named)
