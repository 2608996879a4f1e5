"""What tells other programs where an answer ends: generation, configuration and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tandem.artifact.files import atomic_write_json, read_json
from tandem.data.template import ChatTemplate, Ending, stop_ids

_GENERATION = "generation_config.json"


def end_ids(folder: Path) -> list[int]:
    """The tokens at which a model folder's own configuration ends an answer.

    transformers asks generation_config.json first, and config.json where there is none.
    """
    generation = _values(folder / _GENERATION).get("eos_token_id")
    if generation is not None:
        return _listed(generation)
    config = _values(folder / "config.json")
    inner = config.get("text_config")
    found = config.get("eos_token_id")
    if found is None and isinstance(inner, dict):
        found = inner.get("eos_token_id")
    return _listed(found)


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
    wanted = list(dict.fromkeys([*known, *_listed(tokenizer.eos_token_id), ending.token_id]))
    parts = []
    if set(wanted) - set(known):
        generation = _values((folder if (folder / _GENERATION).exists() else base) / _GENERATION)
        atomic_write_json(
            folder / _GENERATION,
            {**generation, "eos_token_id": wanted if len(wanted) > 1 else wanted[0]},
        )
        parts.append(f"generation stops at {', '.join(map(str, wanted))}")
    named = []
    if (folder / "config.json").exists() and _name_in_config(folder, ending.token_id):
        named.append("config.json")
    own = tokenizer.eos_token
    if own != token:
        if _renders_eos(template):
            parts.append(f"the tokenizer's eos_token stays {own}, which the chat template writes")
        else:
            _name_in_tokenizer(folder, token)
            named.append("the tokenizer")
    if named:
        parts.append(f"{' and '.join(named)} name it as eos_token")
    return f"answers end with {token} ({ending.token_id}): {'; '.join(parts)}" if parts else None


def _renders_eos(template: ChatTemplate) -> bool:
    texts = (template.source, *(text for _, text in template.named))
    return any("eos_token" in text for text in texts)


def _name_in_config(folder: Path, token_id: int) -> bool:
    """Whether config.json had to be changed to name a token; lists get it beside their own."""
    path = folder / "config.json"
    config = read_json(path)
    places = [config]
    if isinstance(inner := config.get("text_config"), dict) and "eos_token_id" in inner:
        places.append(inner)
    changed = False
    for place in places:
        before = place.get("eos_token_id")
        if token_id in _listed(before):
            continue
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
    if not path.exists():
        return {}
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def _listed(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else [int(index) for index in ids]
