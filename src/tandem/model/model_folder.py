"""A model's folder: named by a path, the Hub or the demo; what is in it, and whether it is whole.

No weights are loaded here: configuration, tokenizer, and the headers of the weight files. The
functions that need torch or transformers import them, so that mistakes are told at once.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tandem.data.sources.rows import looks_like_path
from tandem.data.tokenize.light_tokenizer import read_light_tokenizer
from tandem.errors import UserError
from tandem.storage.atomic_files import read_json, require_spelled
from tandem.storage.hashing import weight_files

if TYPE_CHECKING:
    from tandem.data.tokenize.vocabulary import AddedTokens

QUANTIZATION = "quantization.json"
"""The file of an adapter's folder that says what its base was rounded to."""

# Files of a model or adapter that are fetched from the Hub, weights first.
_FILES = ["*.safetensors", "adapter_model.bin", "*.json", "*.jinja", "*.model", "tokenizer*"]
# Some Hub pages have the same weights again in their maker's own layout.
_NOT_FILES = ["consolidated*.safetensors", "original/*"]
# Architectures of one part, with plain fields and, unless they say otherwise, an untied head.
_PLAIN = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3", "olmo2", "granite")
# A tokenizer can be loaded from any one of these.
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "vocab.json", "vocab.txt",
)  # fmt: skip


def on_hub(name: str) -> bool:
    """Whether a model is named by a Hub id; a path and the embedded demo's model are not."""
    return not name.startswith("demo:") and not looks_like_path(name)


def model_folder(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local folder of a model: a path, `demo:base`, or a Hub id that is fetched first.

    Without `weights` only what is small of it is fetched: configuration and tokenizer.

    Raises UserError when a path does not exist, the folder is no model, or the Hub refuses.
    """
    if name.startswith("demo:"):
        from tandem.demo.embedded import materialise

        return materialise(name, Path(), seed=0)
    if looks_like_path(name):
        return _local_folder(name)
    return _fetched(name, revision, _FILES if weights else _FILES[2:])


def _fetched(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=files, ignore_patterns=_NOT_FILES
            )
        )
    except errors.GatedRepoError:
        why = "it is gated: accept its conditions on its page, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        why = "the Hub has no model of that name that you may see; check the name and your token"
    except errors.RevisionNotFoundError:
        why = f"it has no revision {revision}; check model_revision"
    except errors.LocalEntryNotFoundError as error:
        why = (
            f"it was never fetched before, and the Hub does not serve it ({first_line(error)}); "
            "check the network"
        )
    except (OSError, ValueError) as error:  # the client's other errors are OSErrors
        why = f"{first_line(error)}; try again, or name a local folder"
    raise UserError(f"model {name} is no local folder, and cannot be fetched from the Hub: {why}.")


def check_fetchable(name: str, folder: Path, revision: str | None) -> None:
    """Raise UserError when the Hub's files of a model hold no weights that could be loaded.

    Nothing is said where the Hub does not answer: what was fetched before is used then. `folder`
    holds what is small of the model.
    """
    from huggingface_hub import HfApi

    try:
        listed = HfApi().model_info(name, revision=revision).siblings or []
    except (OSError, ValueError, RuntimeError):
        return
    try:
        weight_files(folder, named=[file.rfilename for file in listed])
    except UserError as error:
        raise UserError(f"model {name} of the Hub: {error}") from None


def _local_folder(name: str) -> Path:
    try:
        folder = Path(name).expanduser()
        exists, is_folder = folder.exists(), folder.is_dir()
    except (OSError, RuntimeError) as error:  # no permission, a name too long, no such home
        raise UserError(f"model folder {name} cannot be reached: {first_line(error)}") from None
    if not exists:
        raise UserError(
            f"model folder {name} does not exist. Check the path (a Hub id is written owner/name)."
        )
    if not is_folder:
        raise UserError(f"model {name} is a file. Name the folder that holds the model.")
    require_spelled(folder)
    return folder


def require_model(folder: Path, *, weights: bool = True) -> None:
    """Raise UserError unless the folder holds a whole transformers model (not an adapter).

    Without `weights` it need not hold any.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter, not a whole model. Merge it into its base first: tandem "
            f"merge --base-model-path BASE --lora-model-path {folder} --output-path OUT"
        )
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder} is no model folder: it has no config.json{adapters_inside(folder)}. Name "
            "the folder that holds config.json, *.safetensors and the tokenizer."
        )
    if weights:
        weight_files(folder)


def adapters_inside(folder: Path) -> str:
    """What to add to a message about a folder whose own folders are adapters."""
    inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    return f"; its folders {', '.join(inside)} are adapters: name one" if inside else ""


def load_config(folder: Path, *, weights: bool = True) -> Any:
    """The transformers configuration of a local model folder; see `require_model`."""
    require_model(folder, weights=weights)
    return read_config(folder)


def read_config(folder: Path) -> Any:
    """The transformers configuration in a folder, weights or not."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # damaged files lead a configuration anywhere
        raise UserError(f"{folder / 'config.json'} cannot be used: {first_line(error)}") from None
    text = config.get_text_config()
    padding, rows = (getattr(text, name, None) for name in ("pad_token_id", "vocab_size"))
    if isinstance(padding, int) and isinstance(rows, int) and padding >= rows:
        # torch refuses such an embedding.
        raise UserError(
            f"{folder / 'config.json'} has pad_token_id {padding}, and the model has {rows} rows "
            f"in its embedding (vocab_size), the last for id {rows - 1}. Name a token that has a "
            "row, such as the end token, or take pad_token_id out."
        )
    return config


@dataclass(frozen=True)
class StatedConfig:
    """What config.json says, under the names of transformers' configurations."""

    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    def get_text_config(self) -> StatedConfig:
        """The part about text, which is all of it."""
        return self


def stated_config(folder: Path) -> StatedConfig | None:
    """What config.json says of a model by itself; None where transformers has to be asked.

    That is so for defaults of an architecture, models of several parts, quantised ones, and values
    that `read_config` refuses.
    """
    try:
        config = read_json(folder / "config.json")
        rows, length = config.get("vocab_size"), config.get("max_position_embeddings")
        tied, padding = config.get("tie_word_embeddings", False), config.get("pad_token_id")
        plain = config.get("model_type") in _PLAIN and "quantization_config" not in config
    except (OSError, ValueError, AttributeError):  # reported by transformers
        return None
    if not plain or type(rows) is not int or type(length) is not int or type(tied) is not bool:
        return None
    if min(rows, length) <= 0 or (type(padding) is int and padding >= rows):
        return None
    return StatedConfig(rows, length, tied)


def described_rows(config: Any, added: AddedTokens | None = None) -> int:
    """Rows of the model that a configuration describes, with those that added tokens get."""
    rows = int(config.get_text_config().vocab_size)
    return max([rows, *(index + 1 for index in (added.ids if added else ()))])


def known_config(folder: Path, *, weights: bool = True) -> Any:
    """The `stated_config` of a local model, or where that is None transformers' configuration.

    Raises UserError as `load_config` does.
    """
    require_model(folder, weights=weights)
    return stated_config(folder) or read_config(folder)


def model_without_weights(config: Any, folder: Path | None = None) -> Any:
    """The causal language model that a configuration describes, on torch's meta device.

    Raises UserError, which names the folder, for a configuration that describes none.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            # What a forward needs in which no number is looked at: plain masks, and the one dtype
            # that grouped products of experts take.
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation="eager", dtype=torch.bfloat16
            )
    except Exception as error:  # a strange config can lead a model's constructor anywhere
        path = "config.json" if folder is None else folder / "config.json"
        raise UserError(
            f"{path} describes no causal language model that can be made ({error}). Copy or "
            "download it again."
        ) from None
    return model.eval()


def check_whole(folder: Path, described: Any) -> None:
    """Raise UserError when the files hold fewer numbers than config.json's model has.

    `described` is that model without weights.

    Loading would allocate the model that config.json describes, whatever size it is, and fill what
    is missing with random numbers. Only the files' headers are read. Quantised weights are packed,
    so they are not counted.
    """
    from tandem.model.weight_files import parts_of, read_headers

    headers = read_headers(folder)
    if getattr(described.config, "quantization_config", None) is not None:
        return
    wanted = {name: parameter.numel() for name, parameter in described.named_parameters()}
    there = sum(math.prod(header.shape) for header in headers.values())
    if there < sum(wanted.values()):
        filled = {weight for part in parts_of(headers, described) for weight in part.weights}
        missing = sorted(wanted.keys() - filled)
        raise UserError(
            f"{folder} is not a whole model: its config.json describes "
            f"{sum(wanted.values()):,} parameters, its files hold {there:,}"
            + (f" (without {', '.join(missing[:3])})" if missing else "")
            + ". Copy or download it again, or correct config.json."
        )


def check_unquantized(folder: Path, config: Any) -> None:
    """Raise UserError for a model that is quantised already: nothing is merged into that."""
    places = (config, config.get_text_config())
    stated = (getattr(place, "quantization_config", None) for place in places)
    settings = next((each for each in stated if each is not None), None)
    if settings is None:
        return
    values = settings if isinstance(settings, dict) else settings.to_dict()
    method = str(values.get("quant_method") or "")
    raise UserError(
        f"{folder} is quantised already ({method or 'quantization_config in config.json'}), and "
        "an adapter that is trained on it could not be merged into it. Take the model's 16-bit "
        "edition; with `quantization: nf4` training holds it in 4 bits."
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the vocabulary of a tokenizer."""
    return any((folder / name).exists() for name in _TOKENIZERS)


def read_tokenizer(folder: Path) -> Any:
    """A tokenizer of a local folder that encodes; transformers' only where no other is sure.

    Raises UserError as `load_tokenizer` does.
    """
    return read_light_tokenizer(folder) or load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local folder; raises UserError when none is there or can be loaded."""
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} has no tokenizer. Put the model's own there: tokenizer.json with "
            "tokenizer_config.json, or tokenizer.model."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizer libraries raise bare Exceptions, too
        raise UserError(
            f"{folder} has no usable tokenizer ({first_line(error)}). Copy or download its files "
            "again."
        ) from None


def context_length(config: Any) -> int | None:
    """How many tokens a model was made for, None if its configuration does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def check_context(config: Any, max_length: int, folder: Path, key: str = "max_length") -> None:
    """Raise UserError when `max_length`, called `key`, exceeds the context that is stated."""
    require_context(context_length(config), max_length, folder, key)


def check_lengths(folder: Path, lengths: Mapping[str, int], *, weights: bool = True) -> None:
    """Raise UserError for a folder that is no model, and lengths beyond a context that it states.

    `lengths` are in tokens, by what messages call them; see `require_model` for `weights`.
    """
    require_model(folder, weights=weights)
    config = stated_config(folder)
    for key, length in lengths.items() if config is not None else ():
        check_context(config, length, folder, key)


def require_context(context: int | None, max_length: int, folder: Path, key: str) -> None:
    """Raise UserError when `max_length`, called `key`, exceeds a context; None is any length."""
    if context is not None and max_length > context:
        raise UserError(
            f"{key} {max_length} exceeds the context of {folder}, {context} tokens "
            f"(max_position_embeddings). Set {key} to {context} or less."
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the error's type where it has none."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
