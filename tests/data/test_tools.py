"""Tools and tool calls: rendered as by transformers, trained to the call's end, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tandem.data.encoded.encode_chunk import EncodingOptions, encode_chunk
from tandem.data.formats.format import Format
from tandem.data.formats.known_formats import FORMATS, detect
from tandem.data.formats.tool_calls import Malformed, read_calls, read_tools
from tandem.data.ledger import Entry, Ledger
from tandem.data.read_records import formatted_chunks, records_of
from tandem.data.records import Conversation, Origin
from tandem.data.sources.chunks import Row, RowChunk
from tandem.data.tokenize.chat_template import prompt_ids, resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.tokenize.template_capabilities import ToolCallForm
from tandem.data.truncation.limits import Limits
from tandem.recipe.data_source import DataSource

from .built import prepare_conversations, prepare_pairs

# Tools in the system turn, calls in tags, results of one exchange together in a user turn.
TAGGED = """
{%- if tools %}{{ '<|im_start|>system\\nYou may call:' }}
{%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}
{%- if messages[0].role == 'system' %}{{ '\\n' + messages[0].content }}{% endif %}
{{- '<|im_end|>\\n' }}{% elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<result>' + m.content + '</result>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- '<|im_start|>assistant\\n' + (m.content or '') }}
{%- for call in m.tool_calls %}
{{- '<call>{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}</call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif m.role != 'system' %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Tools in the first question, one call a turn as bare JSON, results under a role of their own.
HEADED = """
{%- set ns = namespace(tools=tools) %}{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls is defined %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call a turn') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '[assistant]{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}
{{- '}' + eos_token }}
{%- elif m.role == 'tool' %}{{ '[ipython]' }}{{ m.content | tojson }}{{ eos_token }}
{%- else %}{{ '[' + m.role + ']' }}
{%- if m.role == 'user' and ns.tools %}
{%- for tool in ns.tools %}{{ tool | tojson(indent=4) }}{{ '\\n' }}{% endfor %}
{%- set ns.tools = none %}
{%- endif %}{{ m.content | trim + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""

# Calls only where the content is null, with arguments as text.
PICKY = """{{ bos_token }}
{%- for m in messages %}{{ '[' + m.role + ']' }}
{%- if m.role == 'assistant' and m.content is none %}
{%- for call in m.tool_calls %}{{ call.function.name + call.function.arguments }}{% endfor %}
{{- eos_token }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a città.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Forlì"}},
}
SAID: list[dict[str, Any]] = [
    {"role": "user", "content": "How is it in Forlì?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "18 degrees"},
    {"role": "assistant", "content": "Mild."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Gladly."},
]


def written(folder: Path, source: str) -> str:
    file = folder / "template.jinja"
    file.write_text(source)
    return str(file)


def prepared(tokenizer: Any, template: str, folder: Path, rows: list[Any], **options: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = Ledger(None)
    options.setdefault("max_length", 1024)
    trees = options.pop("kind", prepare_conversations)(
        [DataSource(path=str(file))],
        tokenizer=tokenizer,
        template=resolve_template(tokenizer, template),
        ledger=ledger,
        **options,
    )
    return trees, ledger


def verdict(row: dict[str, Any]) -> Any:
    """A row's record, or why it is dropped."""
    known = detect(row)
    assert known
    chunk = RowChunk("made.jsonl", 1, (Row(row, Origin("made.jsonl", 1)),))
    (found,) = records_of(chunk, known.id, "stop")
    return found.reason if isinstance(found, Entry) else found


def read(row: dict[str, Any]) -> Conversation:
    record = verdict(row)
    assert isinstance(record, Conversation)
    return record


ANSWERED = {"chosen": "C", "rejected": "R"}
HALF: dict[str, Any] = {"prompt": "Q", "completion": "A"}
EXCHANGE = [("human", "Q"), ("gpt", "A")]
DIALOGUE = [{"from": who, "value": text} for who, text in EXCHANGE]
SCORED = [{"response": text, "overall_score": number} for number, text in enumerate("CBA")]
# Rows of each format; those of several make pairs together.
ROWS: dict[str, list[dict[str, Any]]] = {
    "orca_dpo_pairs": [{"question": "Q", **ANSWERED}],
    "explicit preference": [{"prompt": "Q", **ANSWERED}],
    "ShareGPT preference": [{"conversations": DIALOGUE[:1], **ANSWERED}],
    "Alpaca preference": [{"instruction": "Q", **ANSWERED}],
    "implicit preference": [
        {"chosen": "\n\nHuman: Q\n\nAssistant: C", "rejected": "\n\nHuman: Q\n\nAssistant: R"}
    ],
    "UltraFeedback": [{"instruction": "Q", "completions": SCORED}],
    "ShareGPT": [{"conversations": DIALOGUE}],
    "messages": [{"messages": SAID[4:]}],
    "unpaired preference": [{**HALF, "label": True}, {**HALF, "completion": "B", "label": False}],
    "labelled Alpaca": [
        {"instruction": "Q", "output": text, "kto_tag": text == "A"} for text in "AB"
    ],
    "labelled instruction and response": [
        {"instruction": "Q", "response": text, "label": text == "A"} for text in "AB"
    ],
    "labelled prompt and response": [
        {"prompt": "Q", "response": text, "label": text == "A"} for text in "AB"
    ],
    "labelled query and response": [
        {"query": "Q", "response": text, "label": text == "A"} for text in "AB"
    ],
    "labelled question and answer": [
        {"question": "Q", "answer": text, "label": text == "A"} for text in "AB"
    ],
    "labelled messages": [
        {"messages": [SAID[0], {"role": "assistant", "content": text}], "label": text == "A"}
        for text in "AB"
    ],
    "labelled ShareGPT": [
        {"conversations": [DIALOGUE[0], {"from": "gpt", "value": text}], "label": text == "A"}
        for text in "AB"
    ],
    "prompt and completion": [HALF],
    "scored answers": [{"prompt": "Q", "answers": ["A", "B"], "scores": [2, 1]}],
    "Alpaca": [{"instruction": "Q", "output": "A"}],
    "input preference": [{"input": "Q", **ANSWERED}],
    "response preference": [{"instruction": "Q", "chosen_response": "C", "rejected_response": "R"}],
    "conversation": [{"conversation": DIALOGUE}],
    "instruction and response": [{"instruction": "Q", "response": "A"}],
    "prompt and response": [{"prompt": "Q", "response": "A"}],
    "query and response": [{"query": "Q", "response": "A"}],
    "question and response": [{"question": "Q", "response": "A"}],
    "question and answer": [{"question": "Q", "answer": "A"}],
}


@pytest.mark.parametrize("known", [one for one in FORMATS if one.chat], ids=lambda known: known.id)
def test_every_format_has_tools(tmp_path: Path, known: Format) -> None:
    file = tmp_path / "rows.jsonl"
    source = DataSource(path=str(file), format=known.name, completions=known.completions)

    def told(tools: str) -> tuple[set[str], set[str]]:
        rows = [row | {"tools": tools} for row in ROWS[known.name]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ledger = Ledger(None)
        found = set()
        for chunk, id_ in formatted_chunks([source], known.kind, ledger, "stop"):
            for one in records_of(chunk, id_, "stop"):
                if isinstance(one, Entry):
                    ledger.add([one], 0)
                else:
                    found.add(one.tools)
        return found, {one.reason for one in ledger.entries}

    assert told(json.dumps(TOOLS))[0] == {read_tools(TOOLS)}
    assert told("[1]") == (set(), {"`tools` is not a list of functions"})


@pytest.mark.parametrize(("source", "family"), [(TAGGED, "byte"), (HEADED, "mistral")])
def test_prompts_and_answers_are_those_of_plain_transformers(
    request: pytest.FixtureRequest, tmp_path: Path, source: str, family: str
) -> None:
    tokenizer = request.getfixturevalue(f"{family}_tokenizer")
    template = written(tmp_path, source)
    row = {"messages": SAID, "tools": TOOLS}
    trees, ledger = prepared(tokenizer, template, tmp_path, [row])
    assert ledger.entries == []
    trained = []
    for number, end in enumerate((1, 3, 5)):
        fed = tokenizer.apply_chat_template(
            SAID[:end], tools=TOOLS, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        record = read(row)
        ours = prompt_ids(
            tokenizer, resolve_template(tokenizer, template), record.turns[:end], record.tools
        )
        # Mistral's tokenizer merges `]{`, so its answers have a branch each.
        sequence = trees[0].sequence(min(number, len(trees[0].branches) - 1))
        assert ours == fed == sequence.input_ids[: len(fed)].tolist()
        assert not sequence.trained[len(fed) - 1]
        assert sequence.trained[len(fed)]
        ids, mask = sequence.input_ids[len(fed) :], sequence.trained[len(fed) :]
        stop = [*mask.tolist(), False].index(False)
        trained.append(tokenizer.decode(ids[:stop]))
    eos = "<|im_end|>" if family == "byte" else "</s>"
    key = "arguments" if family == "byte" else "parameters"
    call = '{"name": "weather", "' + key + '": {"city": "Forlì"}}'
    call = f"<call>{call}</call>" if family == "byte" else call
    assert trained == [call + eos, "Mild." + eos, "Gladly." + eos]


def test_every_spelling_is_the_same_record(tmp_path: Path) -> None:
    as_text = {**CALL, "function": {"name": "weather", "arguments": json.dumps({"city": "Forlì"})}}
    wanted = read({"messages": SAID, "tools": TOOLS})
    for calls in ([as_text], json.dumps([CALL])):
        said = [SAID[0], {**SAID[1], "tool_calls": calls, "content": ""}, *SAID[2:]]
        assert read({"messages": said, "tools": json.dumps(TOOLS)}) == wanted
    # Columns of a table have every key in every row.
    said = [{"tool_calls": None, "name": None, "tool_call_id": None, **turn} for turn in SAID]
    assert read({"messages": said, "tools": [json.dumps(TOOLS[0])]}) == wanted
    # OpenAI's older key; where both are, `tools` is what counts.
    functions = [tool["function"] for tool in TOOLS]
    assert read({"messages": SAID, "functions": functions}) == wanted
    assert read({"messages": SAID, "functions": json.dumps(TOOLS), "tools": None}) == wanted
    assert read({"messages": SAID, "functions": [{"name": "other"}], "tools": TOOLS}) == wanted
    assert verdict({"messages": SAID, "functions": [1]}) == "`functions` is not a list of functions"
    for empty in (None, [], "", "[]"):
        assert read({"messages": SAID[:1] + SAID[3:4], "tools": empty}).tools == ""


def test_the_older_key_of_a_call_is_read() -> None:
    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    result = {"role": "function", "name": "weather", "content": "18 degrees"}
    turns = read({"messages": [SAID[0], old, result, SAID[3]]}).turns
    assert turns[1].message()["tool_calls"] == [{"type": "function", "function": CALL["function"]}]
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"]
    both = {**old, "content": "I look.", "tool_calls": []}
    assert read({"messages": [SAID[0], both, result, SAID[3]]}).turns[1].calls


def test_sharegpt_has_its_own_names_for_calls_and_results(tmp_path: Path) -> None:
    call = json.dumps({"name": "weather", "arguments": {"city": "Forlì"}})
    for name in ("tool", "function", "observation"):
        said = [("human", "Q"), ("function_call", call), (name, "18"), ("gpt", "Mild.")]
        row = {"conversations": [{"from": who, "value": text} for who, text in said]}
        turns = read({**row, "tools": json.dumps(TOOLS)}).turns
        assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"]
        assert turns[1].message()["tool_calls"][0]["function"]["arguments"] == {"city": "Forlì"}
        assert turns[1].calls


@pytest.mark.parametrize("name", ["chatml", "neural-chat"])
def test_what_the_template_does_not_render_is_dropped_with_the_reason(
    byte_tokenizer: Any, mistral_tokenizer: Any, tmp_path: Path, name: str
) -> None:
    tokenizer = byte_tokenizer if name == "chatml" else mistral_tokenizer
    plain = {"messages": SAID[4:]}
    rows = [{"messages": SAID}, {**plain, "tools": TOOLS}, plain]
    trees, ledger = prepared(tokenizer, name, tmp_path, rows)
    assert [tree.origin.row for tree in trees] == [3]
    assert [one.reason for one in ledger.entries] == [
        "the chat template does not render tool calls",
        "the chat template does not render tools",
    ]


# A model's template for plain turns, which ends answers with a token of another name.
PLAIN = """{{ bos_token }}
{%- for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}
{%- if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""


@pytest.mark.parametrize("rebuilt", [False, True])
def test_records_with_tools_take_the_models_template_for_them(
    mistral_tokenizer: Any, tmp_path: Path, *, rebuilt: bool
) -> None:
    headed = HEADED.replace("m.content | trim + eos_token", "m.content | trim + ' ' + eos_token")
    mistral_tokenizer.chat_template = {"default": PLAIN, "tool_use": headed}
    template = resolve_template(mistral_tokenizer, None)
    chat = ChatTokenizer.of(mistral_tokenizer, template)
    if rebuilt:  # as another process has it
        assert chat.parts
        chat = ChatTokenizer.from_parts(chat.parts)
    rows: list[dict[str, Any]] = [
        {"messages": SAID, "tools": TOOLS}, {"messages": SAID[4:]}, {"messages": SAID}
    ]  # fmt: skip
    chunk = RowChunk("f", 3, tuple(Row(row, Origin("f", n)) for n, row in enumerate(rows, 1)))
    known = detect(rows[0])
    assert known
    plan = EncodingOptions("conversations", Limits(1024, None), "stop")
    batch = encode_chunk(chat, plan, chunk, known.id)
    assert batch.arrays.rows.tolist() == [1, 2]
    # Calls without a list of tools take the other template, as in transformers.
    (dropped,) = batch.entries
    assert (dropped.row, dropped.reason) == (3, "the chat template does not render tool calls")
    for tools, row in ((TOOLS, rows[0]), (None, rows[1])):
        fed = mistral_tokenizer.apply_chat_template(
            row["messages"][:-1], tools=tools, add_generation_prompt=True,
            tokenize=True, return_dict=False,
        )  # fmt: skip
        record = read(row)
        assert prompt_ids(mistral_tokenizer, template, record.turns[:-1], record.tools) == fed
    source = DataSource(path=str(tmp_path / "rows.jsonl"))
    Path(source.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    trees = prepare_conversations(
        [source], tokenizer=mistral_tokenizer, template=template, max_length=1024,
        ledger=Ledger(None),
    )  # fmt: skip
    texts = [
        mistral_tokenizer.decode(tree.sequence(len(tree.branches) - 1).input_ids) for tree in trees
    ]
    assert '"name": "weather"' in texts[0]
    assert texts[0].endswith("[assistant]Gladly. </s>")
    assert texts[1].endswith("[user]Thanks.</s> [assistant]Gladly.</s>")


def test_results_need_a_template_that_knows_them(mistral_tokenizer: Any, tmp_path: Path) -> None:
    deaf = HEADED.replace("{%- elif m.role == 'tool' %}", "{%- elif m.role == 'nobody' %}").replace(
        "{%- else %}", "{%- elif m.role != 'tool' %}"
    )
    said = [*SAID[4:], SAID[0], {"role": "assistant", "content": "asks"}, SAID[2], SAID[3]]
    rows = [{"messages": said}, {"messages": SAID[4:]}]
    _, ledger = prepared(mistral_tokenizer, written(tmp_path, deaf), tmp_path, rows)
    assert [one.reason for one in ledger.entries] == [
        "the chat template does not render tool results"
    ]


def test_a_template_gets_calls_in_the_form_that_it_takes(
    mistral_tokenizer: Any, tmp_path: Path
) -> None:
    template = written(tmp_path, PICKY)
    chat = ChatTokenizer.of(mistral_tokenizer, resolve_template(mistral_tokenizer, template))
    assert chat.with_tools.calls == ToolCallForm(text=True, null=True)
    assert not chat.with_tools.tools
    trees, _ = prepared(mistral_tokenizer, template, tmp_path, [{"messages": SAID[:4]}])
    sequence = trees[0].sequence(0)
    text = mistral_tokenizer.decode(sequence.input_ids[sequence.trained])
    assert text.startswith('weather{"city": "Forlì"}</s>')


def test_a_template_that_refuses_a_record_names_it(mistral_tokenizer: Any, tmp_path: Path) -> None:
    from tandem.errors import UserError

    two = [SAID[0], {**SAID[1], "tool_calls": [CALL, CALL]}, *SAID[2:]]
    with pytest.raises(UserError, match=r"rows\.jsonl, row 1: .*one call a turn"):
        prepared(mistral_tokenizer, written(tmp_path, HEADED), tmp_path, [{"messages": two}])


@pytest.mark.parametrize("policy", ["keep_end", "drop_old_turns"])
def test_old_calls_go_with_their_results(byte_tokenizer: Any, tmp_path: Path, policy: str) -> None:
    row = {"messages": [*SAID, *SAID[4:]], "tools": TOOLS}
    template = written(tmp_path, TAGGED)
    (tree,), _ = prepared(byte_tokenizer, template, tmp_path, [row])
    size = len(tree.sequence(0).input_ids)
    short = {"messages": [*SAID[4:], *SAID[4:]], "tools": TOOLS}
    (tree,), _ = prepared(byte_tokenizer, template, tmp_path, [short])
    fits = tree.sequence(0).input_ids.tolist()
    (tree,), ledger = prepared(
        byte_tokenizer, template, tmp_path, [row], max_length=len(fits), too_long=policy
    )
    assert tree.sequence(0).input_ids.tolist() == fits
    assert ledger.entries[0].reason == "old turns dropped"
    assert f"sequence {size} -> {len(fits)}" in ledger.entries[0].detail


def test_the_question_before_a_call_is_what_is_cut(byte_tokenizer: Any, tmp_path: Path) -> None:
    long = {**SAID[0], "content": "word " * 200 + "How is it?"}
    row = {"messages": [long, *SAID[1:4]], "tools": TOOLS}
    for policy in ("keep_end", "drop_old_turns"):
        (tree,), ledger = prepared(
            byte_tokenizer,
            written(tmp_path, TAGGED),
            tmp_path,
            [row],
            max_length=400,
            max_prompt_length=380,
            too_long=policy,
        )
        text = byte_tokenizer.decode(tree.sequence(0).input_ids)
        assert "How is it?" in text
        assert "</call>" in text
        assert "18 degrees" in text
        assert text.endswith("Mild.<|im_end|>")
        assert byte_tokenizer.decode(tree.sequence(0).input_ids[tree.sequence(0).trained]).endswith(
            "</call><|im_end|>Mild.<|im_end|>"
        )
        assert ledger.entries[0].reason == "prompt cut"


def test_pairs_have_tools_and_calls_in_their_prompts(byte_tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt": SAID[:3], "chosen": "Mild.", "rejected": "Hot.", "tools": TOOLS}
    called = {"prompt": SAID[:1], "chosen": [SAID[1]], "rejected": "No."}
    (tree,), ledger = prepared(
        byte_tokenizer, written(tmp_path, TAGGED), tmp_path, [row, called], kind=prepare_pairs
    )
    fed = byte_tokenizer.apply_chat_template(
        SAID[:3], tools=TOOLS, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert tree.sequence(0).input_ids[: len(fed)].tolist() == fed
    assert ledger.entries[0].reason == "an answer that calls tools, outside of a conversation"


@pytest.mark.parametrize(
    ("turns", "right"),
    [
        ((0, 1, 2, 2, 3), True),
        ((0, 1, 2, 1, 2, 3), True),
        ((0, 1), True),
        ((0, 1, 4, 5), False),
        ((0, 1, 3), False),
        ((0, 2, 3), False),
        ((0, 1, 2, 4, 5), False),
    ],
)
def test_calls_come_before_results_and_results_before_answers(
    turns: tuple[int, ...], right: bool
) -> None:
    row = {"messages": [SAID[i] for i in turns]}
    if right:
        assert len(read(row).turns) == len(turns)
        return
    assert verdict(row) == "roles out of order"


@pytest.mark.parametrize("value", ["{", "3", 3, [3], [{}], {"function": 3}, '["\\ud800"]'])
def test_what_is_no_call_or_tool_has_a_reason(value: Any) -> None:
    with pytest.raises(Malformed):
        read_calls(value)
    if value != {"function": 3}:
        with pytest.raises(Malformed):
            read_tools(value)
