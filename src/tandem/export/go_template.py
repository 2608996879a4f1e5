"""Chat templates in Go's template language, as Ollama reads them: the known ones, and a renderer.

Ollama gives a template the conversation's messages and its system prompts as one text, and joins
messages of one role that follow each other. A template that is written here uses little of the
language, so a small evaluator renders it as Go does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.data.records import Turn

# BOS and EOS stand for the model's tokens. Ollama's runner adds the BOS in front of all.
_DEFAULT_SYSTEM = "You are a helpful assistant who answers truthfully and clearly."
_USER = '{{ if eq .Role "user" }}'
_ANSWER, _DONE = '{{ else if eq .Role "assistant" }}', "{{ end }}{{ end }}"
KNOWN: dict[str, str] = {
    "chatml": "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n",
    "llama-3": "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n"
    "{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n",
    "zephyr": "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}EOS\n{{ end }}<|assistant|>\n",
    "tulu": '{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}{{ if eq .Role "assistant" }}EOS'
    "{{ end }}\n{{ end }}<|assistant|>\n",
    "neural-chat": "### System:\n{{ if .System }}{{ .System }}{{ else }}"
    + _DEFAULT_SYSTEM
    + "{{ end }}EOS{{ range .Messages }}"
    + _USER
    + "\n### User:\n{{ .Content }}EOS"
    + _ANSWER
    + "\n### Assistant:\n{{ .Content }}EOS"
    + _DONE
    + "\n### Assistant:\n",
    "alpaca": "{{ if .System }}{{ .System }}{{ else }}Below is an instruction that describes a "
    "task. Write a response that appropriately completes the request.{{ end }}\n\n"
    "{{ range .Messages }}"
    + _USER
    + "### Instruction:\n{{ .Content }}\n\n### Response:\n"
    + _ANSWER
    + "{{ .Content }}EOS\n\n"
    + _DONE,
    "mistral": "{{ $system := .System }}{{ range .Messages }}"
    + _USER
    + '[INST] {{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}{{ .Content }} [/INST]'
    + _ANSWER
    + "{{ .Content }}EOS"
    + _DONE,
    "llama-2": '{{ $system := .System }}{{ $later := "" }}{{ range .Messages }}'
    + _USER
    + '{{ if $later }}BOS{{ end }}{{ $later = "yes" }}[INST] {{ if $system }}<<SYS>>\n'
    '{{ $system }}\n<</SYS>>\n\n{{ $system = "" }}{{ end }}{{ .Content }} [/INST]'
    + _ANSWER
    + " {{ .Content }} EOS"
    + _DONE,
    "bare": '{{ range .Messages }}{{ .Content }}{{ if eq .Role "assistant" }}EOS{{ end }}{{ end }}',
    "phi": "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>",
    "gemma": "{{ $system := .System }}{{ range .Messages }}"
    + _USER
    + '<start_of_turn>user\n{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}'
    "{{ .Content }}<end_of_turn>\n"
    + _ANSWER
    + "<start_of_turn>model\n{{ .Content }}<end_of_turn>\n"
    + _DONE
    + "<start_of_turn>model\n",
}
"""Go templates by the name of the chat template that they write; BOS and EOS are to be filled."""


def known_templates(bos: str, eos: str) -> Iterator[tuple[str, str]]:
    """The known templates with a model's tokens, each with its name."""
    for name, text in KNOWN.items():
        yield name, text.replace("EOS", eos).replace("BOS", bos)


def render_go(source: str, turns: Sequence[Turn]) -> str:
    """What Ollama writes for a conversation with a template.

    Raises ValueError for a part of Go's language that no known template uses.
    """
    messages, system = _collated(turns)
    tree = _parse(re.split(r"(\{\{.*?\}\})", source, flags=re.DOTALL))
    scope: dict[str, Any] = {"$": {"System": system, "Messages": messages}}
    return "".join(_rendered(tree, scope["$"], scope))


def _collated(turns: Sequence[Turn]) -> tuple[list[dict[str, str]], str]:
    """The messages, those of one role that follow each other as one, and all system prompts."""
    messages: list[dict[str, str]] = []
    for turn in turns:
        if messages and messages[-1]["Role"] == turn.role:
            messages[-1]["Content"] += "\n\n" + turn.content
        else:
            messages.append({"Role": turn.role, "Content": turn.content})
    return messages, "\n\n".join(turn.content for turn in turns if turn.role == "system")


@dataclass(frozen=True)
class _Block:
    """A part of a template: a text, an action, or a block with what is within it."""

    kind: str  # text, action, if, range
    value: str
    body: tuple[_Block, ...] = ()
    otherwise: tuple[_Block, ...] = ()


def _parse(pieces: list[str]) -> tuple[_Block, ...]:
    blocks, rest = _block(pieces)
    if rest:
        raise ValueError(f"{rest[0]} closes nothing")
    return blocks


def _block(pieces: list[str]) -> tuple[tuple[_Block, ...], list[str]]:
    """The blocks up to an `end` or `else` of the block around them, and what follows from it."""
    found: list[_Block] = []
    while pieces:
        piece, *rest = pieces
        if not piece.startswith("{{"):
            found.append(_Block("text", piece))
            pieces = rest
            continue
        action = piece[2:-2].strip()
        word, _, value = action.partition(" ")
        if word in ("end", "else"):
            return tuple(found), pieces
        if word not in ("if", "range"):
            found.append(_Block("action", action))
            pieces = rest
            continue
        block, pieces = _branch(word, value, rest)
        found.append(block)
    return tuple(found), []


def _branch(word: str, value: str, pieces: list[str]) -> tuple[_Block, list[str]]:
    body, pieces = _block(pieces)
    if not pieces:
        raise ValueError(f"{word} {value} has no end")
    closing, *rest = pieces
    action = closing[2:-2].strip()
    if action == "end":
        return _Block(word, value, body), rest
    if action == "else":
        otherwise, pieces = _block(rest)
        return _Block(word, value, body, otherwise), pieces[1:]
    chained, rest = _branch("if", action.removeprefix("else if "), rest)
    return _Block(word, value, body, (chained,)), rest


def _rendered(blocks: Sequence[_Block], dot: Any, scope: dict[str, Any]) -> Iterator[str]:
    for block in blocks:
        if block.kind == "text":
            yield block.value
        elif block.kind == "if":
            chosen = block.body if _value(block.value, dot, scope) else block.otherwise
            yield from _rendered(chosen, dot, scope)
        elif block.kind == "range":
            for one in _value(block.value, dot, scope):
                yield from _rendered(block.body, one, scope)
        elif match := re.fullmatch(r"(\$\w+) :?= (.+)", block.value):
            scope[match[1]] = _value(match[2], dot, scope)
        else:
            yield str(_value(block.value, dot, scope))


def _value(expression: str, dot: Any, scope: Mapping[str, Any]) -> Any:
    """The value of a field, a variable, a text, or of `eq` with two of them."""
    words = re.findall(r'"[^"]*"|\S+', expression)
    if words[0] == "eq" and len(words) == 3:
        return _value(words[1], dot, scope) == _value(words[2], dot, scope)
    if len(words) != 1:
        raise ValueError(f"{expression} is not evaluated here")
    word = words[0]
    if word.startswith('"'):
        return word[1:-1]
    if word.startswith("$."):
        return scope["$"][word[2:]]
    if word.startswith("$"):
        return scope[word]
    if word.startswith("."):
        return dot[word[1:]]
    raise ValueError(f"{expression} is not evaluated here")
