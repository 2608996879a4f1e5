"""YAML text to plain data that remembers its lines, and back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from tandem.errors import UserError

Location = tuple[str | int, ...]
"""A key's place in a recipe, such as `("sft", "data", 0, "path")`."""

# YAML 1.1 wants a dot in 1e-4, or it is a string; nobody writing a learning rate knows that.
_FLOAT = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
_DATE_TAG = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, dates as text, and refuses a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE_TAG]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> tuple[Any, dict[Location, int]]:
    """The plain data of a YAML text, and the line (from 1) of each key.

    Args:
        text: one YAML document.
        where: what to call it in a message, a file's path for instance.

    Raises UserError for text that is no YAML, with the line.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:  # a control character, in a binary file for instance
        number = text.count("\n", 0, error.position) + 1
        raise UserError(f"{where}:{number}: not valid YAML: {error.reason}") from error
    try:
        node = loader.get_single_node()
        lines = dict(_lines(node, (), ())) if node is not None else {}
        return (None if node is None else loader.construct_document(node)), lines
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {error}") from error
    finally:
        loader.dispose()


def dump_yaml(data: object) -> str:
    """Plain data as YAML, keys in the order they come in."""
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100))


def _lines(node: Any, at: Location, above: tuple[Any, ...]) -> Iterator[tuple[Location, int]]:
    if node in above:  # an alias that holds itself
        raise yaml.MarkedYAMLError(
            problem="an alias refers to itself", problem_mark=node.start_mark
        )
    yield at, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*at, str(key.value))
            yield from _lines(value, place, (*above, node))
            yield place, key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, (*at, index), (*above, node))
