"""Reasoning beside an answer: rendered as by transformers and trained, or refused; never lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.formats.format import InvalidRecord
from tandem.data.formats.known_formats import detect
from tandem.data.ledger import Ledger
from tandem.data.records import Conversation, Origin
from tandem.data.tokenize.chat_template import resolve_template
from tandem.recipe.data_source import DataSource

from .built import prepare_conversations, prepare_pairs

# As Qwen3's: thoughts of the last answer only, and empty ones where there are none.
LAST = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}
{{- m.content or '' }}
{%- for call in m.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As gpt-oss's: under another key, in a message of its own.
CHANNELS = """
{%- for m in messages %}
{%- if m.thinking %}{{ '<|im_start|>analysis\\n' + m.thinking + '\\n' }}{% endif %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"""

ONE = [
    {"role": "user", "content": "One and one?"},
    {"role": "assistant", "content": "Two.", "reasoning_content": "Both are one."},
]
TWO = [
    *ONE,
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "Three.", "reasoning_content": "Two and one."},
]


def prepared(
    tokenizer: Any, template: str, folder: Path, rows: list[Any], prepare: Any = None
) -> Any:
    (folder / "template.jinja").write_text(template)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = Ledger(None)
    chosen = resolve_template(tokenizer, str(folder / "template.jinja"))
    trees = (prepare or prepare_conversations)(
        [DataSource(path=str(file))],
        tokenizer=tokenizer, template=chosen, ledger=ledger, max_length=512,
    )  # fmt: skip
    return trees, ledger


def trained(tokenizer: Any, tree: Any) -> list[str]:
    sequences = [tree.sequence(branch) for branch in range(len(tree.branches))]
    return [tokenizer.decode(one.input_ids[one.trained]) for one in sequences]


def under(key: str, turns: list[dict[str, str]]) -> list[dict[str, str]]:
    return [
        {key if name == "reasoning_content" else name: said for name, said in turn.items()}
        for turn in turns
    ]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("source", [LAST, CHANNELS])
def test_the_template_gets_reasoning_under_its_own_key(
    byte_tokenizer: Any, tmp_path: Path, key: str, source: str
) -> None:
    (tree,), ledger = prepared(byte_tokenizer, source, tmp_path, [{"messages": under(key, ONE)}])
    assert ledger.entries == []
    whole = byte_tokenizer.apply_chat_template(
        under("thinking", ONE) if source is CHANNELS else ONE, tokenize=False
    )
    assert "Both are one." in whole
    assert byte_tokenizer.decode(tree.sequence(0).input_ids) + "\n" == whole
    (answer,) = trained(byte_tokenizer, tree)
    wanted = {
        LAST: "<think>\nBoth are one.\n</think>\n\nTwo.<|im_end|>",
        CHANNELS: "analysis\nBoth are one.\n<|im_start|>assistant\nTwo.<|im_end|>",
    }
    assert answer == wanted[source]


def test_each_answer_is_trained_with_its_reasoning_and_without_that_of_past_ones(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    (tree,), _ = prepared(byte_tokenizer, LAST, tmp_path, [{"messages": TWO}])
    assert trained(byte_tokenizer, tree) == [
        "<think>\nBoth are one.\n</think>\n\nTwo.<|im_end|>",
        "<think>\nTwo and one.\n</think>\n\nThree.<|im_end|>",
    ]
    last = byte_tokenizer.decode(tree.sequence(1).input_ids)
    assert last + "\n" == byte_tokenizer.apply_chat_template(TWO, tokenize=False)
    assert "Both are one." not in last


def test_a_call_may_have_reasoning(byte_tokenizer: Any, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = {"role": "assistant", "content": None, "tool_calls": [call], "thinking": "I add."}
    (tree,), _ = prepared(byte_tokenizer, LAST, tmp_path, [{"messages": [ONE[0], said]}])
    (answer,) = trained(byte_tokenizer, tree)
    assert answer.startswith("<think>\nI add.\n</think>\n\n<call>")
    assert answer.endswith("</call><|im_end|>")


def test_reasoning_that_the_template_does_not_render_is_not_lost_in_silence(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    rows = [{"messages": ONE}, {"messages": under("thinking", [ONE[0], {**ONE[1]}])}]
    plain = {"messages": [ONE[0], {"role": "assistant", "content": "Two.", "thinking": None}]}
    trees, ledger = prepared(mistral_tokenizer, template, tmp_path, [*rows, plain])
    assert [tree.origin.row for tree in trees] == [3]
    reasons = [one.reason for one in ledger.entries]
    assert reasons == ["the chat template does not render reasoning"] * 2


def test_an_answer_of_a_pair_has_no_reasoning_beside_it(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    rejected = [{"role": "assistant", "content": "Three."}]
    good = {"prompt": TWO[:3], "chosen": "Three.", "rejected": "Four."}
    bad = {"prompt": ONE[:1], "chosen": [ONE[1]], "rejected": rejected}
    trees, ledger = prepared(byte_tokenizer, LAST, tmp_path, [good, bad], prepare_pairs)
    assert [tree.origin.row for tree in trees] == [1]
    (entry,) = ledger.entries
    assert entry.reason == "an answer with reasoning beside it, outside of a conversation"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"thinking": 3}, "`thinking` is not a text"),
        ({"thinking": "a", "reasoning": "b"}, "`thinking` and `reasoning` differ"),
        ({"reasoning": "\ud800"}, "no JSON text"),
    ],
)
def test_what_is_no_reasoning_has_a_reason(more: dict[str, Any], reason: str) -> None:
    row = {"messages": [ONE[0], {"role": "assistant", "content": "Two.", **more}]}
    known = detect(row)
    assert known
    with pytest.raises(InvalidRecord, match=reason):
        known.read(row, Origin("made.jsonl", 1))


def test_the_same_reasoning_under_two_keys_is_one() -> None:
    more = {"thinking": "a", "reasoning_content": "a", "reasoning": ""}
    row = {"messages": [ONE[0], {"role": "assistant", "content": "Two.", **more}]}
    known = detect(row)
    assert known
    (record,) = known.read(row, Origin("made.jsonl", 1))
    assert isinstance(record, Conversation)
    assert record.turns[1].reasoned
    assert not record.turns[1].calls
    assert record.turns[1].message()["reasoning_content"] == "a"
