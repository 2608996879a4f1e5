"""Tools and tool calls of a row: several spellings to the one that chat templates take.

OpenAI's: `tools` is a list of functions with JSON schemas, `tool_calls` of an assistant's turn a
list of `{"id", "type": "function", "function": {"name", "arguments"}}`; `tool_call_id` and `name`
of a tool's turn say what it answers. The older `function_call` is one call. All of them may be JSON
texts, as data sets on the Hub have them; arguments that are JSON texts become objects, as inference
servers make them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class Malformed(ValueError):  # noqa: N818  (a verdict on a record)
    """Tools or calls that cannot be understood; the message is the reason."""


def read_tools(value: object) -> str:
    """A row's tools as a JSON list, empty when there are none.

    Raises `Malformed` for anything but a list of objects.
    """
    tools = _parsed(value, "`tools`")
    if tools is None or tools == []:
        return ""
    if isinstance(tools, Mapping):
        tools = [tools]
    if not isinstance(tools, list):
        raise Malformed("`tools` is not a list of functions")
    tools = [_parsed(tool, "`tools`") for tool in tools]
    if not all(isinstance(tool, Mapping) and tool for tool in tools):
        raise Malformed("`tools` is not a list of functions")
    return _text(tools)


def read_calls(value: object) -> str:
    """The `extra` of an assistant's turn that calls tools, empty when it calls none.

    Raises `Malformed` for a call without a name.
    """
    calls = _parsed(value, "`tool_calls`")
    if calls is None or calls == []:
        return ""
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, list):
        raise Malformed("`tool_calls` is not a list of calls")
    return _text({"tool_calls": [_call(_parsed(call, "`tool_calls`")) for call in calls]})


def read_result(item: Mapping[str, object]) -> str:
    """The `extra` of a tool's turn: whose result it is."""
    found = {key: item.get(key) for key in ("name", "tool_call_id")}
    told = {key: value for key, value in found.items() if isinstance(value, str) and value}
    return _text(told) if told else ""


def _call(call: object) -> dict[str, Any]:
    """One call as `{"id"?, "type", "function": {"name", "arguments"}}`."""
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
    given = {} if arguments is None else arguments
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": given}}


def _parsed(value: object, what: str) -> Any:
    """The value, or what it spells as JSON text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise Malformed(f"{what} is a text that is no JSON") from error


def _text(value: object) -> str:
    """JSON text, if it can be encoded (JSON can spell half a surrogate pair)."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except (TypeError, UnicodeEncodeError) as error:
        raise Malformed("tools or tool calls hold what is no JSON text") from error
    return text
