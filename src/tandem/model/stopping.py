"""What tells other programs where an answer ends: generation, configuration and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tandem.artifact.files import atomic_write_json, read_json_object
from tandem.data.template import ChatTemplate, Ending, stop_ids
from tandem.errors import UserError

_GENERATION = "generation_config.json"


def end_ids(folder: Path) -> list[int]:
    """The tokens at which a model folder's own configuration ends an answer.

    transformers asks generation_config.json first, and config.json where there is none.
    """
    for path in (folder / _GENERATION, folder / "config.json"):
        values = _values(path)
        inner = values.get("text_config")
        for place in (values, inner if isinstance(inner, dict) else {}):
            if (found := _ends_in(path, place)) is not None:
                return found
    return []


def all_stop_ids(folder: Path, tokenizer: Any, template: ChatTemplate) -> list[int]:
    """The tokens that end an answer of a model folder: the template's, EOS, and its own."""
    return list(dict.fromkeys([*stop_ids(tokenizer, template), *end_ids(folder)]))


def write_ends(
    folder: Path, base: Path, tokenizer: Any, template: ChatTemplate, ending: Ending
) -> str | None:
    """Let a folder's files say that an answer ends with the template's end token, too.

    generation_config.json stops at all that ended an answer before, and at this token.
    config.json, where the folder has one, and the tokenizer's eos_token name this token, as
    converters read one token only. A template that writes eos_token would render another text
    then: for such a one the tokenizer keeps its own.

    Args:
        folder: a merged model's, or an adapter's; has its tokenizer.
        base: the model folder whose ends hold so far.
        tokenizer: the base's, or the folder's as it is.
        template: the chat template in force.
        ending: how it closes an answer.

    Returns:
        What was set, None when everything said so before.
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
        if _renders_eos(template):
            parts.append(
                f"the tokenizer's eos_token stays {before}, which the chat template writes"
            )
        else:
            _name_in_tokenizer(folder, token)
            named.append("the tokenizer")
    if named:
        parts.append(f"it is eos_token of {' and '.join(named)} as well")
    return f"answers end with {token} ({ending.token_id}): {'; '.join(parts)}" if parts else None


def _renders_eos(template: ChatTemplate) -> bool:
    texts = (template.source, *(text for _, text in template.named))
    return any("eos_token" in text for text in texts)


def _name_in_config(folder: Path, token_id: int) -> bool:
    """Whether config.json had to be changed to name a token; lists get it beside their own."""
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
    found = values.get("eos_token_id")
    if found is None:
        return None
    listed = found if isinstance(found, list) else [found]
    if not all(type(index) is int for index in listed):
        raise UserError(
            f"{path}: eos_token_id is {found!r}, and should be a token's id or a list of them"
        )
    return listed
