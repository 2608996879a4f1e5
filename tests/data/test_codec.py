"""The quick way to ids and texts gives exactly what transformers' tokenizer gives."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from tandem.data.records import Turn
from tandem.data.tokenize.chat_template import (
    ChatTemplate,
    find_ending,
    resolve_template,
    template_names,
)
from tandem.data.tokenize.codec import FastCodec, TransformersCodec, make_codec
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.errors import UserError

# Pieces that tokenizers treat specially: blanks, line breaks, end tokens, halves of end tokens.
PIECES = [
    "Hello", " there", "  ", "\n", "\n\n", "\t", ".", "é", "世界", "🙂", "<", "</", "</s", "</s>",
    "s>", "<s>", "<|im_end|>", "<|im_end", "|>", "<|im_start|>", "<|endoftext|>", "user", "▁",
    "a" * 40, "",
]  # fmt: skip
TOKENIZERS = ["mistral_tokenizer", "stories_tokenizer", "byte_tokenizer"]


def texts(count: int) -> list[str]:
    draw = random.Random(3)
    return ["".join(draw.choices(PIECES, k=draw.randrange(12))) for _ in range(count)]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", template_names())
def test_ids_texts_and_spans_are_transformers_own(
    name: str, template: str, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    chat = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, template))
    if chat.ending.missing:  # no such end token
        return
    ours, theirs = chat.codec, TransformersCodec(tokenizer, chat.template)
    assert isinstance(ours, FastCodec)
    assert ours._cut == chat.ending.token
    given = texts(150)
    ids = theirs.tokenize(given)
    assert ours.tokenize(given) == ids
    assert [ours.decode(one) for one in ids] == [theirs.decode(one) for one in ids]
    assert [ours.spans(text) for text in given[:50]] == [theirs.spans(t) for t in given[:50]]
    for first, second, third in zip(given[::3], given[1::3], given[2::3], strict=True):
        turns = [Turn("system", first), Turn("user", second), Turn("assistant", third)]
        for some in (turns, turns[:2], turns[1:]):
            for prompt in (False, True):
                assert ours.render(some, prompt=prompt) == theirs.render(some, prompt=prompt)


def test_refusals_are_told_alike(mistral_tokenizer: Any) -> None:
    template = resolve_template(mistral_tokenizer, "neural-chat")
    chat = ChatTokenizer.of(mistral_tokenizer, template)
    turns = [Turn("user", "Q"), Turn("system", "S")]
    messages = []
    for codec in (chat.codec, TransformersCodec(mistral_tokenizer, template)):
        with pytest.raises(UserError, match="cannot render the turns") as refused:
            codec.render(turns, prompt=True)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(
    "beside",
    [
        {"content": "</s>x", "special": True, "normalized": False},  # contains the end token
        {"content": "Z</", "special": True, "normalized": False},  # begins where it may end
    ],
)
def test_texts_are_not_cut_at_a_token_that_may_be_part_of_another(
    beside: dict[str, Any], mistral_tokenizer: Any
) -> None:
    import copy

    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(mistral_tokenizer)
    tokenizer.add_tokens([AddedToken(beside.pop("content"), **beside)])
    template = resolve_template(tokenizer, "neural-chat")
    codec = ChatTokenizer.of(tokenizer, template).codec
    assert isinstance(codec, FastCodec)
    assert codec._cut is None
    given = [*texts(300), "a</s>x b", "aZ</s>b"]
    assert codec.tokenize(given) == TransformersCodec(tokenizer, template).tokenize(given)


def test_a_tokenizer_that_says_otherwise_keeps_its_own_way(mistral_tokenizer: Any) -> None:
    template = resolve_template(mistral_tokenizer, "neural-chat")
    ending = find_ending(mistral_tokenizer, template)
    assert ending

    class Otherwise(type(mistral_tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, *arguments: Any, **named: Any) -> Any:
            encoded = super()._encode_plus(*arguments, **named)
            encoded["input_ids"] = [[5, *ids] for ids in encoded["input_ids"]]
            return encoded

    own = mistral_tokenizer.__class__
    mistral_tokenizer.__class__ = Otherwise
    try:
        codec, parts = make_codec(mistral_tokenizer, template, ending)
    finally:
        mistral_tokenizer.__class__ = own
    assert isinstance(codec, TransformersCodec)
    assert parts is None


@pytest.mark.parametrize(
    "source",
    [
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}",
        "{{ m }}{{ m.content + eos_token }}",
        "{% set n = namespace(x=loop.index) %}{% set n.x = n.x + 1 %}{{ n.x }}{{ m.content }}</s>",
        "{{ bos_token or 'none' }}{{ enable_thinking is defined }}{{ m.get('name') }}"
        "{{ m.content }}</s>{% if loop.last %}{% break %}{% endif %}",
    ],
)
def test_what_templates_of_the_hub_use_is_rendered_as_by_transformers(
    source: str, mistral_tokenizer: Any
) -> None:
    template = ChatTemplate("t", "{% for m in messages %}" + source + "{% endfor %}")
    chat = ChatTokenizer.of(mistral_tokenizer, template)
    assert isinstance(chat.codec, FastCodec)
    theirs = TransformersCodec(mistral_tokenizer, template)
    turns = [Turn("system", "S"), Turn("user", "Q"), Turn("assistant", "A"), Turn("user", "Q2")]
    for _ in range(2):  # nothing of one rendering is left for the next
        for some in (turns, turns[1:], turns[:3]):
            assert chat.codec.render(some, prompt=True) == theirs.render(some, prompt=True)


def test_all_renderings_of_a_run_have_the_same_time(mistral_tokenizer: Any) -> None:
    zephyr = resolve_template(mistral_tokenizer, "zephyr").source
    dated = ChatTemplate(
        "dated", "{{ strftime_now('%d %b %Y, %H:%M') }}" + zephyr, now=datetime(2024, 2, 29, 23, 59)
    )
    chat = ChatTokenizer.of(mistral_tokenizer, dated)
    assert chat.parts
    for one in (chat, ChatTokenizer.from_parts(chat.parts)):
        assert isinstance(one.codec, FastCodec)
        text = one.codec.render([Turn("user", "Q")], prompt=True)
        assert text.startswith("29 Feb 2024, 23:59<s><|user|>")
    later = ChatTokenizer.of(mistral_tokenizer, replace(dated, now=datetime(2024, 3, 1)))
    assert later.parts
    assert later.parts.identity != chat.parts.identity


def test_a_template_that_writes_the_date_has_another_identity_every_day(
    mistral_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = resolve_template(mistral_tokenizer, "zephyr").source
    dated = ChatTemplate("dated", "{{ strftime_now('%d') }}" + plain)
    first = ChatTokenizer.of(mistral_tokenizer, dated).parts
    import transformers.utils.chat_template_utils as theirs

    class Tomorrow:
        @staticmethod
        def now() -> Any:
            from datetime import datetime, timedelta

            return datetime.now() + timedelta(days=1)

    assert first is not None
    before = first.identity
    again = ChatTokenizer.of(mistral_tokenizer, dated).parts
    assert again is not None
    assert again.identity == before
    monkeypatch.setattr(theirs, "datetime", Tomorrow)
    monkeypatch.setattr("tandem.data.tokenize.light_tokenizer.datetime", Tomorrow)
    other = ChatTokenizer.of(mistral_tokenizer, dated).parts
    assert other is not None
    assert other.identity != before
