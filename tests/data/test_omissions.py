"""What a chat template does not render is found for each shape of a record, and drops it."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tandem.data.encoded.encode_chunk import EncodingOptions, encode_chunk
from tandem.data.ledger import Ledger
from tandem.data.read_records import formatted_chunks
from tandem.data.records import Turn
from tandem.data.tokenize.chat_template import missing_tokens, resolve_template, template_names
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.tokenize.template_omissions import Omissions
from tandem.data.tokenize.vocabulary import add_tokens
from tandem.data.truncation.limits import Limits
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

from .built import prepare_conversations, prepare_pairs

SYSTEM = {"role": "system", "content": "Answer in French only."}
ASKED = {"role": "user", "content": "Two and two?"}
SAID = {"role": "assistant", "content": "Quatre."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "add", "content": "4"}

CONVERSATIONS = EncodingOptions("conversations", Limits(512, None), "stop")

END = "{% if add_generation_prompt %}A: {% endif %}"
TURN = "{{ {'user': 'Q', 'assistant': 'A'}.get(m.role, m.role) }}: {{ m.content or '' }}"
CALLED = (
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}"
)


def over(messages: str, turn: str = TURN + CALLED, before: str = "") -> str:
    """A template that renders some of the messages, each as a turn."""
    return (
        "{{ bos_token }}" + before + "{% for m in " + messages + " %}" + turn
        + "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}" + END
    )  # fmt: skip


DEAF = over("messages if m.role != 'system'")
TOOLS = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
TEMPLATES = {
    "no system": over("messages if m.role != 'system'", before=TOOLS),
    "system with tools": over("messages if m.role != 'system' or tools", before=TOOLS),
    "last two": over("messages[-2:]"),
    "first lines": over("messages", "A: {{ m.content.split('\n')[0] }}"),
    "call or text": over(
        "messages", "A: {% if m.tool_calls %}" + CALLED + "{% else %}{{ m.content }}{% endif %}"
    ),
    "names": over(
        "messages",
        "A: {{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
    ),
    "wrapped tools": over(
        "messages", before="{% for t in tools or [] %}{{ (t.function or {}).name }}{% endfor %}"
    ),
    "first tool": over("messages", before="{% if tools %}{{ tools[0] | tojson }}{% endif %}"),
    "all": over("messages", before=TOOLS),
}


def reasons(
    tokenizer: Any,
    folder: Path,
    source: str | None,
    rows: Sequence[Any],
    plan: EncodingOptions = CONVERSATIONS,
) -> tuple[list[int], dict[int, str]]:
    """The rows that are trained, and why others are not."""
    choice = None
    if source is not None:
        (folder / "template.jinja").write_text(source)
        choice = str(folder / "template.jinja")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, choice))
    source_rows = [DataSource(path=str(folder / "rows.jsonl"))]
    trained: list[int] = []
    dropped: dict[int, str] = {}
    for chunk, known in formatted_chunks(source_rows, plan.kind, Ledger(None), "stop"):
        batch = encode_chunk(chat, plan, chunk, known)
        trained += batch.arrays.rows.tolist()
        dropped |= {one.row: one.reason for one in batch.entries}
    return trained, dropped


@pytest.mark.parametrize(
    ("name", "record", "omitted"),
    [
        ("no system", {"messages": [SYSTEM, ASKED, SAID]}, "the system turn"),
        ("no system", {"system": "S", "prompt": "Q", "completion": "A"}, "the system turn"),
        (
            "no system",
            {"messages": [{**SYSTEM, "role": "developer"}, ASKED, SAID]},
            "the system turn",
        ),
        ("no system", {"messages": [SYSTEM, ASKED, SAID], "tools": [TOOL]}, "the system turn"),
        ("system with tools", {"messages": [SYSTEM, ASKED, SAID]}, "the system turn"),
        ("system with tools", {"messages": [SYSTEM, ASKED, SAID], "tools": [TOOL]}, ""),
        ("last two", {"messages": [ASKED, SAID]}, ""),
        ("last two", {"messages": [ASKED, SAID, ASKED, SAID]}, "every user turn"),
        ("last two", {"messages": [ASKED, {**SAID, "weight": 0}, ASKED, SAID]}, "every user turn"),
        ("last two", {"messages": [ASKED, SAID, ASKED, {**SAID, "weight": 0}]}, ""),
        ("first lines", {"messages": [ASKED, SAID]}, ""),
        (
            "first lines",
            {"messages": [{**ASKED, "content": "Two?\n\nAnd two?"}, SAID]},
            "every user turn",
        ),
        ("call or text", {"messages": [ASKED, CALLS, RESULT, SAID]}, ""),
        (
            "call or text",
            {"messages": [ASKED, {**CALLS, "content": "I add."}, RESULT, SAID]},
            "the text beside tool calls",
        ),
        ("names", {"messages": [ASKED, CALLS]}, "tool calls"),
        ("wrapped tools", {"messages": [ASKED, SAID], "tools": [TOOL]}, ""),
        ("wrapped tools", {"messages": [ASKED, SAID], "tools": [TOOL["function"]]}, "tools"),
        ("first tool", {"messages": [ASKED, SAID], "tools": [TOOL]}, ""),
        ("first tool", {"messages": [ASKED, SAID], "tools": [TOOL, TOOL]}, "tools"),
        ("all", {"messages": [SYSTEM, ASKED, CALLS, RESULT, SAID], "tools": [TOOL]}, ""),
        ("all", {"messages": [ASKED, CALLS, {**RESULT, "content": ""}, SAID]}, ""),
    ],
)
def test_a_record_is_never_trained_without_what_the_template_leaves_out(
    stories_tokenizer: Any, tmp_path: Path, name: str, record: dict[str, Any], omitted: str
) -> None:
    trained, dropped = reasons(stories_tokenizer, tmp_path, TEMPLATES[name], [record])
    if omitted:
        assert dropped == {1: f"the chat template does not render {omitted}"}
    else:
        assert (trained, dropped) == ([1], {})


def test_pairs_and_texts_are_looked_at_as_well(stories_tokenizer: Any, tmp_path: Path) -> None:
    answers = {"chosen": "Quatre.", "rejected": "Four."}
    pairs = [{"system": "S", "prompt": "Q", **answers}, {"prompt": "Q", **answers}]
    omitted = {1: "the chat template does not render the system turn"}
    plan = EncodingOptions("preference pairs", Limits(512, None), "stop")
    assert reasons(stories_tokenizer, tmp_path, DEAF, pairs, plan) == ([2], omitted)
    texts = [{"messages": [SYSTEM, ASKED, SAID]}, {"messages": [ASKED, SAID]}]
    plan = EncodingOptions("conversations", Limits(512, None), "stop", loss_on="text")
    assert reasons(stories_tokenizer, tmp_path, DEAF, texts, plan) == ([2], omitted)


def test_all_of_a_data_set_that_is_left_out_is_said_with_a_way_out(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [SYSTEM, ASKED, SAID]}) + "\n")
    (tmp_path / "deaf.jinja").write_text(DEAF)
    with pytest.raises(
        UserError, match=r"does not render the system turn .*deaf\.jinja\)\. Choose another `chat_"
    ):
        prepare_conversations(
            [DataSource(path=str(tmp_path / "rows.jsonl"))], tokenizer=mistral_tokenizer,
            template=resolve_template(mistral_tokenizer, str(tmp_path / "deaf.jinja")),
            ledger=Ledger(None), max_length=512,
        )  # fmt: skip


def test_each_shape_is_rendered_once() -> None:
    asked: list[Sequence[Turn]] = []

    def rendered(turns: Sequence[Turn], tools: str, prompt: bool) -> str:
        asked.append(turns)
        return " ".join(turn.content for turn in turns if turn.role != "system")

    omissions = Omissions(rendered)
    for text in ("a", "b", "c" * 1000):
        assert omissions.of_prompt([Turn("user", text)]) == ""
        told = omissions.of_prompt([Turn("system", text), Turn("user", text)])
        assert told == "the chat template does not render the system turn"
        # An empty text is none.
        assert omissions.of_prompt([Turn("system", " "), Turn("user", text)]) == ""
    # What is left out is looked for once more, with texts of as many lines.
    assert len(asked) == 4


@pytest.fixture(scope="module")
def deepseek(shared_data: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "deepseek_v3")


@pytest.mark.parametrize("name", [*template_names(), "deepseek"])
def test_templates_of_the_hub_and_of_the_package_lose_nothing_of_real_data(
    shared_data: Path, tmp_path: Path, stories_tokenizer: Any, deepseek: Any, name: str
) -> None:
    tokenizer = deepseek if name == "deepseek" else copy.deepcopy(stories_tokenizer)
    template = resolve_template(tokenizer, None if name == "deepseek" else name)
    add_tokens(tokenizer, missing_tokens(tokenizer, template))
    for prepare, file in (
        (prepare_conversations, "conversations/slimorca_format.jsonl"),
        (prepare_pairs, "pairs/orca_dpo_pairs.jsonl"),
    ):
        lines = (shared_data / file).read_text().splitlines()[:6]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        ledger = Ledger(None)
        prepare(
            [DataSource(path=str(tmp_path / "rows.jsonl"))], tokenizer=tokenizer, template=template,
            ledger=ledger, max_length=16384,
        )  # fmt: skip
        assert [one for one in ledger.entries if one.outcome == "dropped"] == []


def test_deepseeks_template_renders_calls_only_where_no_text_stands_beside(
    deepseek: Any, tmp_path: Path
) -> None:
    twice = [{**CALLS, "tool_calls": [CALL, CALL]}, RESULT, RESULT]
    beside = [{**twice[0], "content": "I add."}, *twice[1:]]
    rows = [{"messages": [SYSTEM, ASKED, *turns, SAID]} for turns in (twice, beside)]
    trained, dropped = reasons(deepseek, tmp_path, None, rows)
    assert trained == [1]
    assert dropped == {2: "the chat template does not render tool calls"}
