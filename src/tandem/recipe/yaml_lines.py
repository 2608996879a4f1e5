"""Read YAML as plain data with the line of each key, and write it."""

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


# Whole numbers that YAML 1.1 takes for octal (010 is 8) or for minutes and seconds (1:30 is 90).
_OLD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?)$")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, dates and all keys as text.

    It refuses a key given twice, and numbers that YAML 1.1 reads as octal or as hours and minutes.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key is a list or a mapping; write a name",
                    problem_mark=key.start_mark,
                )
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
            # `on`, `no` and 010 are names like any other.
            key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: Any) -> Any:
        numbers = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if node.tag in numbers and _OLD_NUMBER.match(node.value):
            raise yaml.MarkedYAMLError(
                problem=f"{node.value} is octal, or hours and minutes, to YAML; write the number "
                "without a leading 0 or a colon, or a text in quotes",
                problem_mark=node.start_mark,
            )
        return super().construct_scalar(node)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts a text in quotes which `_Loader` would read as a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE_TAG]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> tuple[Any, dict[Location, int]]:
    """Parse a YAML text; returns the plain data, and the line (from 1) of each key.

    Args:
        text: one YAML document.
        where: what to call it in a message, a file's path for instance.

    Raises UserError with the line if the text is not valid YAML.
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
        hint = _hint(error.problem or "")
        raise UserError(f"{where}{line}: not valid YAML: {error.problem or error}{hint}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where}: not valid YAML: its lists are nested too deeply") from error
    except (ValueError, KeyError, AttributeError, OverflowError) as error:  # PyYAML's own
        raise UserError(
            f"{where}: a value does not fit its type in YAML ({error}); put it in quotes, or "
            "remove its tag"
        ) from error
    finally:
        loader.dispose()


def _hint(problem: str) -> str:
    if "unknown escape character" in problem:
        return "; in double quotes a backslash begins an escape: write the text in single quotes"
    if "'\\t'" in problem:
        return "; indent with spaces, not with tabs"
    if "expected a single document" in problem or problem == "but found another document":
        return "; keep what belongs to one recipe, without a second ---"
    return ""


def dump_yaml(data: object) -> str:
    """Write plain data as YAML, with the keys in their order."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


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
