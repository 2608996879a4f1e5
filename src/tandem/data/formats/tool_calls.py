"""Tools, tool calls and reasoning of a row: several spellings to the one chat templates take.

OpenAI's: `tools` is a list of functions with JSON schemas, `tool_calls` of an assistant's turn a
list of `{"id", "type": "function", "function": {"name", "arguments"}}`; `tool_call_id` and `name`
of a tool's turn say what it answers. The older `functions` are tools, `function_call` is one call.
All of them may be JSON texts, as data sets on the Hub have them; arguments that are JSON texts
become objects, as inference servers make them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tandem.data.records import REASONING

# How an answer's reasoning is called: by most servers and templates, by some, by a few.
REASONING_KEYS = (REASONING, "thinking", "reasoning")


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


def read_functions(value: object) -> str:
    """OpenAI's older `functions` as tools, empty when there are none; raises `Malformed`."""
    try:
        listed = read_tools(value)
    except Malformed as reason:
        raise Malformed(str(reason).replace("`tools`", "`functions`")) from reason
    if not listed:
        return ""
    return _text(
        [
            one if "function" in one else {"type": "function", "function": one}
            for one in json.loads(listed)
        ]
    )


def read_answer(calls: object, item: Mapping[str, object]) -> str:
    """The `extra` of an assistant's turn: its tool calls, and its reasoning; empty without both.

    Raises `Malformed` for a call without a name, and for reasoning that is not a text.
    """
    found = {key: item.get(key) for key in REASONING_KEYS}
    said = {key: value for key, value in found.items() if value not in (None, "")}
    if not all(isinstance(value, str) for value in said.values()):
        key = next(key for key, value in said.items() if not isinstance(value, str))
        raise Malformed(f"`{key}` is not a text")
    if len(set(said.values())) > 1:
        raise Malformed(f"{' and '.join(f'`{key}`' for key in said)} differ")
    more: dict[str, object] = {}
    if listed := read_calls(calls):
        more["tool_calls"] = listed
    if said:
        more[REASONING] = next(iter(said.values()))
    return _text(more) if more else ""


def read_calls(value: object) -> list[dict[str, Any]]:
    """The tool calls of an assistant's turn, in one spelling.

    Raises `Malformed` for a call without a name.
    """
    calls = _parsed(value, "`tool_calls`")
    if calls is None or calls == []:
        return []
    if isinstance(calls, Mapping):
        calls = [calls]
    if not isinstance(calls, list):
        raise Malformed("`tool_calls` is not a list of calls")
    return [_call(_parsed(call, "`tool_calls`")) for call in calls]


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
        raise Malformed("tools, tool calls or reasoning hold what is no JSON text") from error
    return text
