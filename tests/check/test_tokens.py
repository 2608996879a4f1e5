"""`tandem show`: the tokens of a row are those of a run, and their texts put together the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from tandem.check.show_page import _STYLES, print_encodings, print_turns, visible
from tandem.check.show_record import encode_row, find_row, records_in, token_texts
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.formats.format import Kind
from tandem.data.ledger import Ledger
from tandem.data.records import Conversation, Preference
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.truncation.limits import Limits
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

from ..data.built import prepare_conversations, prepare_pairs
from .made_data import FORGETFUL, conversation, pair, write

_MANY = 2**31 - 1


def _plan(kind: Kind, length: int = _MANY) -> EncodingOptions:
    return EncodingOptions(kind, Limits(length, None), "stop")


@pytest.mark.parametrize("kind", ["conversations", "preference pairs"])
@pytest.mark.parametrize("length", [_MANY, 200])
def test_ids_and_targets_are_those_of_a_run(
    kind: Kind, length: int, shared_data: Path, mistral_tokenizer: Any, tmp_path: Path
) -> None:
    pairs = kind == "preference pairs"
    real = shared_data / (
        "pairs/orca_dpo_pairs.jsonl" if pairs else "conversations/slimorca_format.jsonl"
    )
    file = write(tmp_path / "a.jsonl", real.read_text().splitlines()[30:45])
    template = resolve_template(mistral_tokenizer, "neural-chat")
    ledger = Ledger(None)
    trees = (prepare_pairs if pairs else prepare_conversations)(
        [DataSource(path=str(file))],
        tokenizer=mistral_tokenizer,
        template=template,
        max_length=length,
        ledger=ledger,
    )
    chat = ChatTokenizer.of(mistral_tokenizer, template)
    for example in trees:
        place = find_row([DataSource(path=str(file))], kind, None, example.origin.row)
        found = encode_row(chat, _plan(kind, length), place)
        (sections,) = found.examples
        assert [s.name for s in sections] == (
            ["shared", "chosen", "rejected"] if pairs else ["record"]
        )
        parts = [example.prefix, *example.branches][0 if pairs else 1 :]
        for section, part in zip(sections, parts, strict=True):
            assert [token.id for token in section.tokens] == part.input_ids.tolist()
            assert ["trained" in token.part for token in section.tokens] == part.trained.tolist()
        assert list(found.entries) == [e for e in ledger.entries if e.row == example.origin.row]


def test_token_texts_put_together_are_the_text(
    mistral_tokenizer: Any, byte_tokenizer: Any, stories_tokenizer: Any
) -> None:
    texts = [
        "Hello  there,\n\n  \u00e9t\u00e9 \u4e16\u754c \U0001f642\U0001f642",
        "a \ufffd and \ufffd\ufffd",
        "",
        "\u00e9",
        " \n x",
    ]
    for tokenizer in (mistral_tokenizer, byte_tokenizer, stories_tokenizer):
        template = resolve_template(
            tokenizer, "chatml" if tokenizer is byte_tokenizer else "neural-chat"
        )
        decode = ChatTokenizer.of(tokenizer, template).codec.decode
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            found = token_texts(ids, decode)
            assert len(found) == len(ids)
            assert "".join(found) == decode(ids)


def test_a_dropped_row_says_why(tmp_path: Path, stories_tokenizer: Any) -> None:
    rows = [conversation(1), {"messages": [{"role": "user", "content": "Anybody?"}]}]
    file = write(tmp_path / "a.jsonl", rows)
    place = find_row([DataSource(path=str(file))], "conversations", None, 2)
    with pytest.raises(UserError, match="row 2: a run would drop this record: no assistant turn"):
        records_in(place)
    chat = ChatTokenizer.of(stories_tokenizer, resolve_template(stories_tokenizer, "neural-chat"))
    found = encode_row(chat, _plan("conversations"), place)
    assert found.examples == ()
    assert [entry.reason for entry in found.entries] == ["no assistant turn"]


def test_rows_are_found_in_their_file(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [conversation(seed) for seed in range(600)])
    second = write(tmp_path / "b.jsonl", ["", conversation(7), "{"])
    sources = [DataSource(path=str(first)), DataSource(path=str(second))]
    for name, row, seed in (("a.jsonl", 599, 598), ("b.jsonl", 2, 7), (str(second), 2, 7)):
        ((record,), _) = records_in(find_row(sources, "conversations", name, row))
        assert isinstance(record, Conversation)
        assert record.turns[0].content == conversation(seed)["messages"][0]["content"]
    for file, row, said in (
        (None, 1, "--row needs --file, because there are 2"),
        ("c.jsonl", 1, "none of the files is called that"),
        ("jsonl", 1, "none of the files is called that"),
        ("a.jsonl", 601, "has no row 601; its last one is 600"),
        ("b.jsonl", 1, "row 1 of .* is empty"),
    ):
        with pytest.raises(UserError, match=said):
            find_row(sources, "conversations", file, row)
    with pytest.raises(UserError, match="row 3: the record is not valid JSON"):
        records_in(find_row(sources, "conversations", "b.jsonl", 3))


def test_a_format_has_the_name_that_recipes_have_for_it(tmp_path: Path) -> None:
    answers = [{"response": text, "overall_score": number} for number, text in enumerate("BA")]
    file = write(tmp_path / "a.jsonl", [{"instruction": "Q", "completions": answers}])
    source = DataSource(path=str(file), completions="best_vs_rest")
    place = find_row([source], "preference pairs", None, 1)
    assert place.format_name == "UltraFeedback"
    ((record,), _) = records_in(place)
    assert isinstance(record, Preference)
    bad = DataSource(path=str(write(tmp_path / "b.jsonl", ["{"])))
    assert find_row([bad], "preference pairs", None, 1).format_name == ""


def test_rows_that_are_put_together_are_told_and_those_left_alone_are_found(tmp_path: Path) -> None:
    rows = [
        {"prompt": "P1", "completion": "good", "label": True},
        {"prompt": "P2", "completion": "alone", "label": True},
        "",
        {"prompt": "P1", "completion": "other", "label": True},
        {"prompt": "P1", "completion": "bad", "label": False},
        {"prompt": "P1", "completion": "worse", "label": False},
    ]
    sources = [DataSource(path=str(write(tmp_path / "a.jsonl", rows)))]
    ((record,), _) = records_in(find_row(sources, "preference pairs", None, 5))
    assert isinstance(record, Preference)
    assert (record.chosen, record.rejected) == ("good", "bad")
    for row, said in (
        (1, "row 1 of .*a.jsonl is no pair of its own; its answer is in that of .*a.jsonl, row 5"),
        (4, "row 4 of .*a.jsonl is no pair of its own; its answer is in that of .*a.jsonl, row 6"),
        (3, "row 3 of .*a.jsonl is empty"),
        (7, "has no row 7; its last one is 6"),
    ):
        with pytest.raises(UserError, match=said):
            find_row(sources, "preference pairs", None, row)
    with pytest.raises(UserError, match="no answer to the same prompt is labelled false"):
        records_in(find_row(sources, "preference pairs", None, 2))
    turns = [{"role": "user", "content": "P1"}, {"role": "assistant", "content": "good"}]
    others = [{"messages": turns, "label": text} for text in ("true", "false")]
    sources.insert(0, DataSource(path=str(write(tmp_path / "b.jsonl", others))))
    for file, row, pair_at in (("a.jsonl", 1, 5), ("b.jsonl", 1, 2)):
        with pytest.raises(UserError, match=f"in that of .*{file}, row {pair_at}"):
            find_row(sources, "preference pairs", file, row)


def _printed(rows: list[Any], tokenizer: Any, tmp_path: Path, **how: Any) -> str:
    kind: Kind = "preference pairs" if "chosen" in rows[0] else "conversations"
    file = write(tmp_path / "a.jsonl", rows)
    template = resolve_template(tokenizer, how.pop("template", "chatml"))
    chat = ChatTokenizer.of(tokenizer, template)
    found = encode_row(chat, _plan(kind), find_row([DataSource(path=str(file))], kind, None, 1))
    ids = how.pop("ids", False)
    console = Console(width=300, record=True, highlight=False, **how)
    with console.capture() as captured:
        print_encodings(console, found, ids=ids)
    return captured.get()


def test_without_a_terminal_each_line_says_what_it_is(byte_tokenizer: Any, tmp_path: Path) -> None:
    row = {"messages": [
        {"role": "user", "content": "Two\tand"},
        {"role": "assistant", "content": "Four\u200b.\n5"},
    ]}  # fmt: skip
    printed = _printed([row], byte_tokenizer, tmp_path, force_terminal=False)
    lines = [line for line in printed.splitlines() if " | " in line]
    assert (
        lines
        == [
            "prompt  | <|im_start|>user\u23ce",
            "prompt  | Two\u2192   and<|im_end|>\u23ce",
            "prompt  | <|im_start|>assistant\u23ce",
            "trained | Four\\u200b.\u23ce",
            "trained | 5<|im_end|>",
            "prompt  | \u23ce",
        ][: len(lines)]
    )
    assert len(lines) >= 5
    assert "\x1b" not in printed


def test_a_pair_shows_what_is_shared_and_both_answers(byte_tokenizer: Any, tmp_path: Path) -> None:
    row = {"prompt": "Why?", "chosen": "It is so.", "rejected": "It is not."}
    printed = _printed([row], byte_tokenizer, tmp_path, force_terminal=False)
    assert "shared+trained | It is" in printed
    shared, chosen, rejected = printed.split("\n\n")[1:]
    assert shared.startswith("what both answers share: ")
    assert chosen.startswith("chosen: ")
    assert rejected.startswith("rejected: ")
    assert "trained | " in chosen
    assert "prompt" not in printed
    same = {"prompt": "Why?", "chosen": "So", "rejected": "So."}
    printed = _printed([same], byte_tokenizer, tmp_path, force_terminal=False)
    assert "\nchosen: 1 token, 1 trained\n" in printed


def test_a_conversation_of_two_branches_has_answers_and_is_no_pair(
    byte_tokenizer: Any, tmp_path: Path
) -> None:
    template = tmp_path / "forgetful.jinja"
    template.write_text(FORGETFUL)
    row = {"messages": [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "<think>Well.</think>It is so."},
        {"role": "user", "content": "And why that?"},
        {"role": "assistant", "content": "<think>Hm.</think>Nobody knows."},
    ]}  # fmt: skip
    printed = _printed(
        [row], byte_tokenizer, tmp_path, template=str(template), force_terminal=False
    )
    legend, shared, first, second = printed.split("\n\n")
    assert "fed once for all answers, not trained" in legend
    assert shared.startswith("what all answers share: ")
    assert first.startswith("answer 1: ")
    assert second.startswith("answer 2: ")
    for word in ("chosen", "rejected", "both"):
        assert word not in printed
    assert "trained | <think>Well.</think>It is so.<|im_end|>" in first
    assert "prompt  | It is so.<|im_end|>" in second


def test_a_terminal_shows_colours_and_the_same_text(byte_tokenizer: Any, tmp_path: Path) -> None:
    coloured = _printed(
        [pair(1)],
        byte_tokenizer,
        tmp_path,
        force_terminal=True,
        color_system="standard",
        no_color=False,
    )
    assert "\x1b[" in coloured
    assert " | " not in coloured


def test_each_part_has_colours_of_its_own_where_there_are_few() -> None:
    console = Console(force_terminal=True, color_system="standard", no_color=False)
    seen = []
    for style in [shade for shades in _STYLES.values() for shade in shades]:
        with console.capture() as captured:
            console.print(Text("x", style), end="")
        seen.append(captured.get())
    assert len(set(seen)) == 8


@pytest.mark.parametrize(
    "colourless", [{"color_system": None}, {"color_system": "standard", "no_color": True}]
)
@pytest.mark.parametrize("ids", [False, True])
def test_a_terminal_without_colours_has_words(
    ids: bool, colourless: dict[str, Any], byte_tokenizer: Any, tmp_path: Path
) -> None:
    printed = _printed(
        [pair(1)], byte_tokenizer, tmp_path, ids=ids, force_terminal=True, **colourless
    )
    lines = [line for line in printed.splitlines() if "|" in line]
    assert lines
    assert all("shared" in line or "trained" in line for line in lines)


def test_ids_are_listed_on_request(byte_tokenizer: Any, tmp_path: Path) -> None:
    printed = _printed([conversation(1)], byte_tokenizer, tmp_path, ids=True)
    lines = [line.split() for line in printed.splitlines() if line.endswith("|")]
    assert [int(line[0]) for line in lines] == list(range(len(lines)))
    start = byte_tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert lines[0] == ["0", str(start), "prompt", "|<|im_start|>|"]


def test_turns_alone_need_no_tokenizer(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [pair(1)])
    ((record,), _) = records_in(find_row([DataSource(path=str(file))], "preference pairs", None, 1))
    console = Console(width=500)
    with console.capture() as captured:
        print_turns(console, record)
    prompt, chosen, rejected = pair(1).values()
    assert captured.get() == f"user:\n  {prompt}\nchosen:\n  {chosen}\nrejected:\n  {rejected}\n"


def test_every_character_can_be_seen() -> None:
    seen = "a\u2192   b\u237d\u240d\u23ce\n\\x07\\u200b\u00e9"
    assert visible("a\tb\u00a0\r\n\x07\u200b\u00e9") == seen
