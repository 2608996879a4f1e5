"""The reference page of all recipe keys, made from the schema: `python -m tandem.recipe.docs_page`.

It prints docs/guide/recipes.md; a test keeps the file equal to what this prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from tandem.recipe.dpo_settings import DpoSettings
from tandem.recipe.explain_errors import submodel
from tandem.recipe.recipe import Recipe
from tandem.recipe.shipped import shipped_recipes
from tandem.recipe.training_settings import SftSettings

_PLAIN = {"string": "text", "boolean": "true, false", "null": "null"}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}

_INTRODUCTION = """\
# Recipes

<!-- Made by `python -m tandem.recipe.docs_page > docs/guide/recipes.md`; do not edit. -->

A recipe is a YAML file that says a whole run. `tandem run RECIPE` takes a file or the name of a
[recipe that ships](#recipes-that-ship). A run's resolved recipe is in its folder as `recipe.yaml`,
and `tandem run RECIPE --dry-run` prints it.

Any key can be set on the command line, with dots between the levels and values as in YAML; null
unsets, and leaves a section out:

```
tandem run demo sft.learning_rate=2e-3 sft.lora.target_modules='[q_proj, v_proj]' evaluate=null
```

A key that does not exist, a key given twice and a value of the wrong type are errors; nothing is
ignored. Keys without a default must be given.

In every path `~`, `$NAME` and `${{NAME}}` are resolved; a variable that is not set is an error.
Keys are text whatever they look like (`no`, `010`). Numbers that YAML 1.1 reads as octal or as
hours and minutes (`010`, `1:30`) are refused; a text that looks like a number or a truth value
(`2024`, `no`) needs quotes.

## Recipes that ship

{shipped}

`tandem recipes` lists them, and `tandem recipes copy NAME` writes one to a file of your own. The
head of each file says data, command, hardware, memory, where its values come from, and what to
expect. Memory is [planned](../internals/plan.md) for the longest records that the recipe allows.
Nobody has measured it on such cards, and there are no figures of quality.
[`tandem rehearse`](rehearsal.md) runs each of them in minutes on a CPU, and the tests do so.
"""


def reference_page(recipe: type[Recipe] = Recipe) -> str:
    """Write the Markdown page: for each section its keys, types, defaults and meanings."""
    sections = {"recipe": recipe, **_below(recipe, {})}  # by the name of a section's first key
    titles = {model.__name__: title for title, model in sections.items()}
    parts = [_INTRODUCTION.format(shipped=_shipped())]
    parts += ["\n".join(_section(title, model, titles)) for title, model in sections.items()]
    return "\n".join(parts)


def _shipped() -> str:
    """A table of the recipes that ship."""
    lines = ["| recipe | what | hardware | memory of a GPU |", "| --- | --- | --- | --- |"]
    for one in shipped_recipes():
        memory = one.head.get("memory", "").partition(", planned")[0].removesuffix(" of each GPU")
        lines.append(f"| `{one.name}` | {one.description} | {one.hardware} | {memory} |")
    return "\n".join(lines)


def _below(model: type[BaseModel], known: dict[str, type[BaseModel]]) -> dict[str, type[BaseModel]]:
    """Add all sections within a section to those known, and return them."""
    for name, field in model.model_fields.items():
        inner = submodel(field.annotation)
        if inner is not None and inner not in known.values():
            known[name] = inner
            _below(inner, known)
    return known


def _section(title: str, model: type[BaseModel], titles: Mapping[str, str]) -> Iterable[str]:
    schema = model.model_json_schema()
    yield f"## {title}\n"
    yield " ".join((model.__doc__ or "").split()) + "\n"
    shared: dict[str, Any] = {}
    if issubclass(model, DpoSettings):
        yield "It has the keys of [sft](#sft), except `loss_on`, and these that differ:\n"
        shared = SftSettings.model_json_schema()["properties"]
    yield "| key | value | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, entry in schema["properties"].items():
        if shared.get(name) == entry:
            continue
        default = "" if name in schema.get("required", ()) else _default(model, name)
        meaning = model.model_fields[name].description
        yield f"| `{name}` | {_type(entry, titles)} | {default} | {meaning} |"
    yield ""


def _default(model: type[BaseModel], name: str) -> str:
    value = model.model_fields[name].default
    if isinstance(value, BaseModel):
        return "the section's own"
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    return "[]" if value == () else '""' if value == "" else str(value)


def _type(entry: dict[str, Any], titles: Mapping[str, str]) -> str:
    """Describe a property of the JSON schema in words."""
    if "anyOf" in entry:
        return " or ".join(_type(one, titles) for one in entry["anyOf"])
    if "$ref" in entry:
        title = titles[entry["$ref"].rsplit("/", 1)[-1]]
        return f"[{title}](#{title}) section"
    if "enum" in entry or "const" in entry:
        return ", ".join(f"`{choice}`" for choice in entry.get("enum", [entry.get("const")]))
    kind = entry["type"]
    if kind == "object":
        return f"mapping of texts to {_type(entry['additionalProperties'], titles)}"
    if kind == "array":
        inner = _type(entry["items"], titles)
        return "[data](#data) sets" if "#data" in inner else f"list of {inner}"
    if kind in ("integer", "number"):
        bounds = " and ".join(
            f"{sign} {_number(entry[key])}" for key, sign in _BOUNDS.items() if key in entry
        )
        return f"{'whole number' if kind == 'integer' else 'number'} {bounds}".strip()
    return _PLAIN[kind]


def _number(value: float) -> str:
    return "2^32" if value == 2**32 else f"{value:g}"


if __name__ == "__main__":
    print(reference_page(), end="")
