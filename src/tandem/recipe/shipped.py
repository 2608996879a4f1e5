"""The recipes that ship: what each says of itself, and how one of them is begun with."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tandem.errors import UserError, nearest
from tandem.recipe.load_recipe import recipe_names
from tandem.recipe.yaml_lines import parse_yaml
from tandem.storage.atomic_files import atomic_write_text

# A line of a recipe's head that names something, and one that goes on.
_FIELD = re.compile(r"# ([a-z]+): +(.+)")
_MORE = re.compile(r"# {3,}(.+)")


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that ships, as its file describes it."""

    name: str
    model: str
    description: str
    head: dict[str, str]  # data, command, hardware, memory, values, expect: those that it has

    @property
    def hardware(self) -> str:
        """What it is made for."""
        return self.head.get("hardware", "")


def shipped_recipes() -> list[ShippedRecipe]:
    """Return all recipes that ship, by name; only their files are read."""
    return [_described(name) for name in recipe_names()]


def copy_recipe(name: str, path: Path) -> Path:
    """Write a shipped recipe to a file, or into a folder under its own name; returns the file.

    Commands in its head are those for the copy. Raises UserError for a name that does not ship, and
    for a file that is there.
    """
    names = recipe_names()
    if name not in names:
        raise UserError(
            f"{name}: no recipe of that name ships.{nearest(name, names)} `tandem recipes` lists "
            "them."
        )
    file = path / f"{name}.yaml" if path.is_dir() else path
    if file.exists():
        raise UserError(f"{file} is there already, and is not overwritten; name another file")
    command = re.compile(rf"(tandem \w+) {re.escape(name)}(?![\w.-])")
    lines = [
        command.sub(lambda found: f"{found[1]} {file}", line) if line.startswith("#") else line
        for line in _text(name).splitlines()
    ]
    atomic_write_text(file, "\n".join(lines) + "\n")
    return file


def _text(name: str) -> str:
    return files("tandem").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")


def _described(name: str) -> ShippedRecipe:
    text = _text(name)
    values = parse_yaml(text, name)[0]
    return ShippedRecipe(name, str(values["model"]), str(values["description"]), _head(text))


def _head(text: str) -> dict[str, str]:
    """The fields of the comment with which a recipe begins."""
    head: dict[str, str] = {}
    last = ""
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if found := _FIELD.fullmatch(line):
            last = found[1]
            head[last] = found[2]
        elif last and (more := _MORE.fullmatch(line)):
            head[last] += f" {more[1]}"
        else:
            last = ""
    return head
