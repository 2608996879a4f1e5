"""Tools, tool calls and reasoning of a row, converted to the spelling that chat templates take.

It is OpenAI's: `tools` is a list of functions with JSON schemas, `tool_calls` of an assistant's
turn a list of `{"id", "type": "function", "function": {"name", "arguments"}}`; `tool_call_id` and
`name` of a tool's turn say what it answers. The older `functions` and `function_call` are read as
well. All may be JSON texts, as on the Hub; arguments that are JSON texts become objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tandem.data.records import REASONING

# Names of an answer's reasoning, the most frequent first.
REASONING_KEYS = (REASONING, "thinking", "reasoning")


class Malformed(ValueError):  # noqa: N818  (a verdict on a record)
    """Tools or calls that cannot be understood; the message is the reason."""


def read_tools(value: object) -> str:
    """Return a row's tools as a JSON list, empty when there are none.

    Raises `Malformed` for anything but a list of objects.
    """
    tools = _listed(value, "`tools`", "functions")
    if not all(isinstance(tool, Mapping) and tool for tool in tools):
        raise Malformed("`tools` is not a list of functions")
    return _text(tools) if tools else ""


def read_functions(value: object) -> str:
    """Return OpenAI's older `functions` as tools, empty when there are none; raise `Malformed`."""
    try:
        listed = read_tools(value)
    except Malformed as reason:
        raise Malformed(str(reason).replace("`tools`", "`functions`")) from reason
    functions = json.loads(listed) if listed else []
    tools = [
        one if "function" in one else {"type": "function", "function": one} for one in functions
    ]
    return _text(tools) if tools else ""


def read_answer(calls: object, item: Mapping[str, object]) -> str:
    """Return the `extra` of an assistant's turn: its tool calls and reasoning; empty without both.

    Raises `Malformed` for a call without a name, and for reasoning that is not a text.
    """
    reasoning = {key: item[key] for key in REASONING_KEYS if item.get(key) not in (None, "")}
    for key, value in reasoning.items():
        if not isinstance(value, str):
            raise Malformed(f"`{key}` is not a text")
    if len(set(reasoning.values())) > 1:
        raise Malformed(f"{' and '.join(f'`{key}`' for key in reasoning)} differ")
    more: dict[str, object] = {}
    if listed := read_calls(calls):
        more["tool_calls"] = listed
    if reasoning:
        more[REASONING] = next(iter(reasoning.values()))
    return _text(more) if more else ""


def read_calls(value: object) -> list[dict[str, Any]]:
    """Return the tool calls of an assistant's turn; raise `Malformed` for one without a name."""
    return [_call(call) for call in _listed(value, "`tool_calls`", "calls")]


def read_result(item: Mapping[str, object]) -> str:
    """Return the `extra` of a tool's turn: whose result it is."""
    values = {key: item.get(key) for key in ("name", "tool_call_id")}
    texts = {key: value for key, value in values.items() if isinstance(value, str) and value}
    return _text(texts) if texts else ""


def _call(call: object) -> dict[str, Any]:
    """Return one call as `{"id"?, "type", "function": {"name", "arguments"}}`."""
    if not isinstance(call, Mapping):
        raise Malformed("`tool_calls` is not a list of calls")
    function = call.get("function")
    if function is None:
        function = call
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Malformed("a tool call without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    arguments = {} if arguments is None else arguments
    inner = {"name": function["name"], "arguments": arguments}
    return {**named, "type": "function", "function": inner}


def _listed(value: object, what: str, of: str) -> list[Any]:
    """Return the objects of a list, of one object, or of their JSON text; none for None."""
    items = _parsed(value, what)
    if items is None:
        return []
    if isinstance(items, Mapping):
        items = [items]
    if not isinstance(items, list):
        raise Malformed(f"{what} is not a list of {of}")
    return [_parsed(item, what) for item in items]


def _parsed(value: object, what: str) -> Any:
    """Return the value, or what it spells as JSON text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise Malformed(f"{what} is a text that is no JSON") from error


def _text(value: object) -> str:
    """Return JSON text, if it can be encoded (JSON can spell half a surrogate pair)."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except (TypeError, UnicodeEncodeError) as error:
        raise Malformed("tools, tool calls or reasoning hold what is no JSON text") from error
    return text
