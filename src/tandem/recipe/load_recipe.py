"""Read recipes: a shipped name or a YAML file, with `key=value` overrides."""

from __future__ import annotations

import codecs
import difflib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tandem.errors import UserError
from tandem.recipe.explain_errors import dotted, explain
from tandem.recipe.recipe import Recipe
from tandem.recipe.section import expanded
from tandem.recipe.yaml_lines import Location, dump_yaml, parse_yaml
from tandem.storage.run_folder import TRAINING_STAGES

_SUFFIXES = (".yaml", ".yml")


def recipe_names() -> list[str]:
    """List the recipes that ship with tandem."""
    entries = (entry.name for entry in files("tandem").joinpath("recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in entries if name.endswith(".yaml"))


def load_recipe(
    name_or_path: str, overrides: Sequence[str] = (), kind: type[Recipe] = Recipe
) -> Recipe:
    """Read and check a recipe.

    Args:
        name_or_path: a shipped recipe's name, a YAML file, or a run folder with a recipe.yaml.
        overrides: `key=value` each; dotted keys, values typed as in YAML, null unsets.
        kind: the recipe's class, if it has more fields.

    Raises UserError naming file and line or override, the key, and the nearest valid name.
    """
    where, text = _read(name_or_path)
    data, lines = parse_yaml(text, where)
    if not isinstance(data, dict):
        raise UserError(
            f"{where}: a recipe is a mapping of keys to values, this file is something else"
        )
    return _checked(data, where, lines, overrides, kind)


def changed_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """Return a recipe with some values changed; raises UserError as `load_recipe` does."""
    if not overrides:
        return recipe
    return _checked(recipe.model_dump(mode="json"), f"recipe {recipe.name}", {}, overrides)


def load_pairs(name_or_path: str | None, overrides: Sequence[str]) -> Recipe:
    """Read a recipe of which only the pairs section and the settings of the run matter.

    `name_or_path` None starts with an empty pairs section. Raises UserError as `load_recipe` does,
    and if no model or server is named to write the answers.
    """
    if name_or_path is not None:
        # Its rounds have no effect here, and would refuse a model that is named.
        recipe = load_recipe(name_or_path, [*overrides, "rounds=1"])
        if recipe.pairs is None:
            raise UserError(f"{name_or_path}: the recipe has no pairs section")
        named = recipe.sft is None
    else:
        # What else a whole recipe must name has no effect here.
        data = {"name": "pairs", "model": "", "output_dir": "", "pairs": {}}
        recipe, named = _checked(data, "tandem pairs", {}, overrides), False
    assert recipe.pairs is not None
    if not named and recipe.pairs.model is None and recipe.pairs.server is None:
        raise UserError(
            "tandem pairs: no model writes the rejected answers; name a weaker one with --model, "
            "or a server with server.base_url=URL server.model=NAME"
        )
    return recipe


def _checked(
    data: dict[str, Any],
    where: str,
    lines: Mapping[Location, int],
    overrides: Sequence[str],
    kind: type[Recipe] = Recipe,
) -> Recipe:
    """Make the recipe of data and overrides; raise UserError with the place of a mistake."""
    texts: dict[Location, str] = {}
    for override in overrides:
        location, value = _parse_override(override)
        texts[location] = override
        _set(data, location, value, override)

    for stage in TRAINING_STAGES:
        section = data.get(stage)
        if isinstance(section, dict) and section.get("lora", "") is None:
            del section["lora"]  # null takes it back, as it does a section that may be missing

    def place(location: Location) -> str:
        below = [text for key, text in texts.items() if key[: len(location)] == location != key]
        if location and below:  # keys that contradict each other: the file's and the overrides'
            return f"{where} with {' '.join(below)}"
        for end in range(len(location), 0, -1):
            # The last of equal or enclosing overrides is the one that set the value.
            if location[:end] in texts:
                return f"override {texts[location[:end]]}"
            if location[:end] in lines:
                return f"{where}:{lines[location[:end]]}"
        return where

    try:
        # JSON is where pydantic's strict mode takes a list for a tuple, yet no text for a number.
        return kind.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise UserError(explain(error, kind, place)) from error
    except TypeError as error:  # binary data, sets: YAML tags that no recipe needs
        raise UserError(
            f"{where}: a value is of a kind that recipes do not have: {error}"
        ) from error


def recipe_to_yaml(recipe: Recipe) -> str:
    """Write the whole resolved recipe as YAML; loading it gives an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json"))


def _read(name_or_path: str) -> tuple[str, str]:
    """Return a recipe's name for messages, and its text."""
    shipped = files("tandem").joinpath("recipes", f"{name_or_path}.yaml")
    if "/" not in name_or_path and shipped.is_file():
        return f"{name_or_path}.yaml (shipped)", shipped.read_text(encoding="utf-8")
    try:
        path = Path(expanded(name_or_path))
    except ValueError as error:
        raise UserError(f"{name_or_path}: no such file: {error}") from error
    if (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if path.is_file():
        try:
            return str(path), _text_of(path.read_bytes())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not a text file in UTF-8, so no recipe; save it in UTF-8"
            ) from error
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if path.is_dir():
        raise UserError(f"{path}: a folder without a recipe.yaml; name a recipe or a YAML file")
    if "/" in name_or_path or name_or_path.endswith(_SUFFIXES):
        raise UserError(f"{path}: no such file")
    names = recipe_names()
    close = difflib.get_close_matches(name_or_path, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise UserError(
        f"{name_or_path}: no recipe of that name, and no such file. {hint}"
        f"Shipped recipes: {', '.join(names)}"
    )


def _text_of(content: bytes) -> str:
    """Decode a recipe: UTF-8, or UTF-16 if its first two bytes say so."""
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if wide else "utf-8-sig")


def _parse_override(override: str) -> tuple[Location, Any]:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key or "" in key.split("."):
        raise UserError(
            f"{override!r} is no override; write key=value, for instance sft.batch_size=32"
        )
    location = tuple(int(part) if part.isdigit() else part for part in key.split("."))
    return location, parse_yaml(text, f"override {override}")[0]


def _set(data: Any, location: Location, value: Any, override: str) -> None:
    """Put a value at its place, making sections that are missing or null."""
    for depth, part in enumerate(location):
        _check_place(data, part, location[:depth], override)
        if depth == len(location) - 1:
            data[part] = value
            return
        if isinstance(data, dict) and data.get(part) is None:
            data[part] = {}
        data = data[part]


def _check_place(data: Any, part: str | int, above: Location, override: str) -> None:
    if isinstance(data, list) and isinstance(part, int):
        if part >= len(data):
            raise UserError(
                f"override {override}: {dotted(above)} has {len(data)} entries, "
                f"counted from 0; there is no {part}"
            )
        return
    if isinstance(data, dict) and isinstance(part, str):
        return
    kind = "a list; its entries are numbers from 0" if isinstance(data, list) else f"{data!r}"
    if isinstance(data, dict):
        kind = "a mapping, not a list"
    raise UserError(f"override {override}: {dotted(above)} is {kind}, so it has no key {part}")
