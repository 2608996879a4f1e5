"""Models and tokenizers from a local folder, the Hub, or the embedded demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tandem.artifact.files import read_json
from tandem.data.sources import looks_like_path
from tandem.errors import UserError

# What a model folder may hold besides weights; everything else on a Hub page stays there.
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*"]


def model_folder(name: str, revision: str | None = None) -> Path:
    """The local folder of a model: a path, `demo:base`, or a Hub id that is fetched first.

    Raises UserError when a path does not exist, the folder is no model, or the Hub refuses.
    """
    if name.startswith("demo:"):
        from tandem.demo.embedded import materialise

        return materialise(name, Path(), seed=0)
    if looks_like_path(name):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise UserError(f"model folder {name} does not exist. Check the path.")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"model {name} is neither a local folder nor could it be fetched from the Hub "
            f"({_first_line(error)}). Check the name, the revision, the network and, for gated "
            "models, your token."
        ) from None


def require_model(folder: Path) -> None:
    """Raise UserError unless the folder holds a whole transformers model (not an adapter)."""
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter, not a whole model. Merge it into its base first: tandem "
            f"merge --base-model-path BASE --lora-model-path {folder} --output-path OUT"
        )
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no *.safetensors weights. Convert older formats first by loading the "
            "model with transformers and calling save_pretrained."
        )


def load_config(folder: Path) -> Any:
    """The transformers configuration of a local model folder."""
    require_model(folder)
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be used: {_first_line(error)}") from None


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A causal language model in evaluation mode, its weights in `dtype` on `device`."""
    require_model(folder)
    # tandem draws its own progress.
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded as a model: {_first_line(error)}") from None
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local folder."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder} has no usable tokenizer: {_first_line(error)}") from None


def load_for_inference(path: str, device: str = "auto") -> tuple[Any, Any]:
    """Model and tokenizer for generation, from a model folder, an adapter folder or a Hub id.

    An adapter is loaded on top of the base its adapter_config.json names. Weights are float32 on
    CPU and as stored elsewhere.
    """
    where = device
    if device == "auto":
        where = "cuda" if torch.cuda.is_available() else "cpu"
    folder = model_folder(path)
    dtype = torch.float32 if where == "cpu" else torch.bfloat16
    if (folder / "adapter_config.json").exists():
        from tandem.model.adapter import load_adapter

        base = model_folder(
            str(read_json(folder / "adapter_config.json")["base_model_name_or_path"])
        )
        model = load_adapter(load_model(base, dtype=dtype, device=where), folder)
    else:
        model = load_model(folder, dtype=dtype, device=where)
    return model, load_tokenizer(folder)


def check_context(config: Any, max_length: int, folder: Path) -> None:
    """Raise UserError when `max_length` exceeds the positions the model was made for."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_length > context:
        raise UserError(
            f"max_length {max_length} exceeds the context of {folder}, {context} tokens "
            f"(max_position_embeddings). Set max_length to {context} or less."
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
