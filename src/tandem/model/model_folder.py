"""Do a model folder's files hold the model that its config.json describes?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tandem.errors import UserError
from tandem.model.weight_files import parts_of, read_heads


def check_whole(folder: Path, config: Any) -> None:
    """Raise UserError when the files hold fewer numbers than config.json's model has.

    Loading would allocate the model that config.json describes, whatever size it is, and fill
    what is missing with random numbers. Only the files' headers are read. Quantised weights are
    packed, so they are not counted.

    Args:
        folder: a local model folder with safetensors files.
        config: its transformers configuration.
    """
    heads = read_heads(folder)
    if getattr(config, "quantization_config", None) is not None:
        return
    try:
        with torch.device("meta"):
            described = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a strange config can lead a model's constructor anywhere
        raise UserError(
            f"{folder / 'config.json'} describes no causal language model that can be made "
            f"({error}). Copy or download it again."
        ) from None
    wanted = {name: parameter.numel() for name, parameter in described.named_parameters()}
    held = sum(math.prod(head.shape) for head in heads.values())
    if held < sum(wanted.values()):
        there = {weight for part in parts_of(heads, described) for weight in part.weights}
        missing = sorted(wanted.keys() - there)
        raise UserError(
            f"{folder} is not a whole model: its config.json describes "
            f"{sum(wanted.values()):,} parameters, its files hold {held:,}"
            + (f" (without {', '.join(missing[:3])})" if missing else "")
            + ". Copy or download it again, or correct config.json."
        )


def check_unquantized(folder: Path, config: Any) -> None:
    """Raise UserError for a model whose weights are quantised already: nothing is merged into it.

    Args:
        folder: a local model folder.
        config: its transformers configuration.
    """
    found = (
        getattr(one, "quantization_config", None) for one in (config, config.get_text_config())
    )
    settings = next((each for each in found if each is not None), None)
    if settings is None:
        return
    values = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(values.get("quant_method") or "")
    raise UserError(
        f"{folder} is quantised already ({method or 'quantization_config in config.json'}), and "
        "an adapter that is trained on it could not be merged into it. Take the model's 16-bit "
        "edition; with `quantization: nf4` training holds it in 4 bits."
    )
