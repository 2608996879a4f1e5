"""What lies beside the weights of a model made of base and adapter: configuration and tokenizer.

The configuration is the base's; tokenizer, special tokens and chat templates are the adapter's,
wherever transformers keeps them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tandem.data.tokenize.chat_template import ChatTemplate, Ending, stop_ids
from tandem.errors import UserError
from tandem.model.model_folder import QUANTIZATION, has_tokenizer, load_tokenizer
from tandem.storage.atomic_files import atomic_write_json, read_json, read_json_object

# A tokenizer's vocabulary, in each of the forms that transformers reads.
_VOCABULARY = (
    "tokenizer.json", "tokenizer.model*", "spiece.model", "sentencepiece*.model", "*.tiktoken",
    "tokenizer.*.json", "tekken.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
)  # fmt: skip
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "tokenization_*.py")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_TEMPLATE_FOLDER = "additional_chat_templates"
# Suffixes of a base's files that are copied beside its weights.
_OF_THE_BASE = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")
# Records of stages and trainers, and files of the maker's own format.
_NOT_OF_THE_MODEL = {
    "manifest.json", "summary.json", "adapter_config.json", QUANTIZATION, "trainer_state.json",
    "checkpoint.json", "params.json",
}  # fmt: skip
# The base's indices of weights by file.
_INDICES = (".safetensors.index.json", ".bin.index.json")


def copy_surroundings(base: Path, adapter: Path, output: Path, dtype: torch.dtype | None) -> None:
    """Put everything but the weights of base and adapter together into an existing folder.

    The adapter gives tokenizer, special tokens and chat templates and nothing else; the base its
    configuration, and what the adapter lacks. The configuration names `dtype`, of the merged
    weights; None keeps the base's.
    """
    of_tokenizer = set(_matching(base, (*_VOCABULARY, *_SETTINGS, *_TEMPLATES)))
    for file in sorted(set(base.iterdir()) - of_tokenizer):
        wanted = file.suffix in _OF_THE_BASE and file.name not in _NOT_OF_THE_MODEL
        if file.is_file() and wanted and not file.name.endswith(_INDICES):
            shutil.copyfile(file, output / file.name)
    combine_tokenizers(base, adapter, output)
    if dtype is not None:
        config = read_json(output / "config.json")
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        atomic_write_json(output / "config.json", config)


def combine_tokenizers(base: Path, adapter: Path, output: Path) -> None:
    """Put the adapter's tokenizer and chat templates into `output`; the base's where it has none.

    Vocabulary and settings come from one tokenizer. Only a SentencePiece model of the base stays,
    for converters, if the adapter has its pieces. Chat templates come from one folder.
    """
    source = adapter if has_tokenizer(adapter) else base
    for file in _matching(source, _VOCABULARY + _SETTINGS):
        shutil.copyfile(file, output / file.name)
    if source == base:
        # Some trainers save settings without a vocabulary.
        for file in _matching(adapter, _SETTINGS):
            shutil.copyfile(file, output / file.name)
        older = "special_tokens_map.json"
        if (adapter / "tokenizer_config.json").exists() and not (adapter / older).exists():
            (output / older).unlink(missing_ok=True)
    else:
        _keep_pieces(base, output)
    _combine_templates(base, adapter, output)


def load_combined_tokenizer(base: Path, adapter: Path) -> Any:
    """The tokenizer that `combine_tokenizers` makes; raises UserError when there is none."""
    with TemporaryDirectory(prefix="tandem-") as name:
        folder = Path(name)
        combine_tokenizers(base, adapter, folder)
        if (base / "config.json").exists():  # may say which class the tokenizer is of
            shutil.copyfile(base / "config.json", folder / "config.json")
        if not has_tokenizer(folder):
            raise UserError(
                f"neither {adapter} nor its base {base} has a tokenizer. Put the base's own there: "
                "tokenizer.json with tokenizer_config.json, or tokenizer.model."
            )
        return load_tokenizer(folder)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in patterns)
    )


def _keep_pieces(base: Path, output: Path) -> None:
    """Keep the base's SentencePiece file where the adapter's tokenizer has all of its tokens."""
    missing = [
        file for file in _matching(base, ("tokenizer.model",)) if not (output / file.name).exists()
    ]
    if not missing or not has_tokenizer(base):
        return
    ours, theirs = load_tokenizer(base).get_vocab(), load_tokenizer(output).get_vocab()
    if ours.items() <= theirs.items():
        for file in missing:
            shutil.copyfile(file, output / file.name)


def write_templates(folder: Path, templates: str | Mapping[str, str]) -> None:
    """Make a chat template, or several by name, the only ones of a tokenizer's folder."""
    for file in _matching(folder, _TEMPLATES):
        file.unlink()
    shutil.rmtree(folder / _TEMPLATE_FOLDER, ignore_errors=True)
    _write_inside(folder, None)
    named = {"default": templates} if isinstance(templates, str) else templates
    for name, text in named.items():
        path = folder / _TEMPLATE_FOLDER / f"{name}.jinja"
        if name == "default":
            path = folder / "chat_template.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _combine_templates(base: Path, adapter: Path, output: Path) -> None:
    """The adapter's chat templates if it has any, else the base's; no other place has one."""
    for source in (adapter, base):
        inside = _values(source / "tokenizer_config.json").get("chat_template")
        jinja, folder = source / "chat_template.jinja", source / _TEMPLATE_FOLDER
        of_processor = source / "chat_template.json"
        if jinja.is_file():
            shutil.copyfile(jinja, output / jinja.name)
        if folder.is_dir():
            shutil.copytree(folder, output / _TEMPLATE_FOLDER)
        if jinja.is_file() or folder.is_dir() or inside:
            _write_inside(output, inside)
            return
        # Older processors keep theirs here, where tokenizers do not look.
        if of_processor.is_file() and (text := read_json_object(of_processor).get("chat_template")):
            write_templates(output, text)
            return


def _write_inside(folder: Path, template: Any) -> None:
    """Put chat templates into tokenizer_config.json; None takes out what is there."""
    path = folder / "tokenizer_config.json"
    settings = _values(path)
    if settings.get("chat_template") == template:
        return
    if template is None:
        del settings["chat_template"]
    else:
        settings["chat_template"] = template
    atomic_write_json(path, settings)


_GENERATION = "generation_config.json"


def end_ids(folder: Path) -> list[int]:
    """The end tokens of generation_config.json, else of config.json, as transformers has them."""
    for path in (folder / _GENERATION, folder / "config.json"):
        values = _values(path)
        inner = values.get("text_config")
        for place in (values, inner if isinstance(inner, dict) else {}):
            if (ends := _ends_in(path, place)) is not None:
                return ends
    return []


def all_stop_ids(folder: Path, tokenizer: Any, template: ChatTemplate) -> list[int]:
    """The tokens that end an answer of a model folder: the template's, EOS, and its own."""
    return list(dict.fromkeys([*stop_ids(tokenizer, template), *end_ids(folder)]))


def write_ends(
    folder: Path, base: Path, tokenizer: Any, template: ChatTemplate, ending: Ending
) -> str | None:
    """Make a folder's files end an answer at the template's end token, too.

    generation_config.json stops at all that ended an answer before, and at this token. config.json,
    where there is one, and the tokenizer's eos_token name this token, as converters read one token
    only. A template that writes eos_token would render another text then: the tokenizer keeps its
    own.

    Args:
        folder: a merged model's, or an adapter's; has its tokenizer.
        base: the model folder that has named the end tokens so far.
        tokenizer: the base's, or the folder's as it is.
        template, ending: the chat template in force, and how it closes an answer.

    Returns what was set, None when everything said so before.
    """
    token = ending.token
    known = end_ids(base)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    wanted = list(dict.fromkeys([*known, *own, ending.token_id]))
    parts = []
    path = (folder if (folder / _GENERATION).exists() else base) / _GENERATION
    generation = _values(path)
    # Where there is such a file, transformers does not look into config.json.
    if set(wanted) - set((_ends_in(path, generation) or []) if path.exists() else known):
        atomic_write_json(
            folder / _GENERATION,
            {**generation, "eos_token_id": wanted if len(wanted) > 1 else wanted[0]},
        )
        parts.append(f"generation stops at {', '.join(map(str, wanted))}")
    named = []
    if (folder / "config.json").exists() and _name_in_config(folder, ending.token_id):
        named.append("config.json")
    before = tokenizer.eos_token
    if before != token:
        if any("eos_token" in text for text in (template.source, *dict(template.named).values())):
            parts.append(
                f"the tokenizer's eos_token stays {before}, which the chat template writes"
            )
        else:
            _name_in_tokenizer(folder, token)
            named.append("the tokenizer")
    if named:
        parts.append(f"it is eos_token of {' and '.join(named)} as well")
    return f"answers end with {token} ({ending.token_id}): {'; '.join(parts)}" if parts else None


def _name_in_config(folder: Path, token_id: int) -> bool:
    """Name an end token in config.json, beside those of a list; return whether it was missing."""
    path = folder / "config.json"
    config = read_json_object(path)
    places = [config]
    if isinstance(inner := config.get("text_config"), dict) and "eos_token_id" in inner:
        places.append(inner)
    changed = False
    for place in places:
        if token_id in (_ends_in(path, place) or []):
            continue
        before = place.get("eos_token_id")
        place["eos_token_id"] = [*before, token_id] if isinstance(before, list) else token_id
        changed = True
    if changed:
        atomic_write_json(path, config)
    return changed


def _name_in_tokenizer(folder: Path, token: str) -> None:
    path = folder / "tokenizer_config.json"
    atomic_write_json(path, {**_values(path), "eos_token": token})
    older = folder / "special_tokens_map.json"
    if older.exists():
        atomic_write_json(older, {**_values(older), "eos_token": token})


def _values(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}


def _ends_in(path: Path, values: Mapping[str, Any]) -> list[int] | None:
    """The ids of end tokens that a file's values name, None if they name none."""
    value = values.get("eos_token_id")
    if value is None:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(index) is int for index in ids):
        raise UserError(
            f"{path}: eos_token_id is {value!r}, and should be a token's id or a list of them"
        )
    return ids
