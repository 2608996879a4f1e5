"""A tokenizer that is read without transformers encodes and renders as transformers does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from tandem.data.records import Turn
from tandem.data.tokenize.chat_template import find_ending, render, resolve_template, template_names
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.tokenize.light_tokenizer import compile_template, read_light_tokenizer
from tandem.demo import embedded

FOLDERS = ("mistral_v1_32000", "qwen3", "deepseek_v3")
TEXTS = (
    "Hello  world\n\n it's 3 o'clock, 12345 times.",
    " \t\u00e9\u4e16\u754c \U0001f600\u200d and \ufeffmarks",
    "<s>[INST] What? [/INST] That.</s> <|im_start|>user\n<|im_end|> <\uff5cUser\uff5c>",
    "def f(x):\n    return x ** 2  # \u03c0\n",
    "",
)
TURNS = (
    Turn("system", "Be brief."),
    Turn("user", " Two and two?\n"),
    Turn("assistant", "Four."),
    Turn("user", "More"),
)


def both(folder: Path) -> tuple[Any, Any]:
    light = read_light_tokenizer(folder)
    assert light is not None
    return light, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=(*FOLDERS, "stories", "demo"))
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    if request.param == "demo":
        return both(Path(embedded.__file__).parent / "base")
    shared = request.getfixturevalue("shared_data")
    if request.param == "stories":
        return both(shared / "models" / "stories260K")
    return both(shared / "tokenizers" / request.param)


def test_ids_texts_and_places_are_those_of_transformers(pair: tuple[Any, Any]) -> None:
    light, theirs = pair
    expected = theirs(list(TEXTS), add_special_tokens=False)["input_ids"]
    assert light(list(TEXTS))["input_ids"] == expected
    for text, ids in zip(TEXTS, expected, strict=True):
        assert light.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        spans = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
        assert [tuple(span) for span in light(text)["offset_mapping"]] == [
            tuple(span) for span in spans["offset_mapping"]
        ]


def test_tokens_are_those_of_transformers(pair: tuple[Any, Any]) -> None:
    light, theirs = pair
    assert light.get_vocab() == theirs.get_vocab()
    assert len(light) == len(theirs)
    assert light.special_tokens_map == theirs.special_tokens_map
    assert set(light.all_special_tokens) == set(theirs.all_special_tokens)
    assert sorted(light.all_special_ids) == sorted(theirs.all_special_ids)
    assert (light.bos_token, light.bos_token_id) == (theirs.bos_token, theirs.bos_token_id)
    assert light.eos_token_id == theirs.eos_token_id
    assert {i: str(t) for i, t in light.added_tokens_decoder.items()} == {
        i: str(t) for i, t in theirs.added_tokens_decoder.items()
    }
    assert light.chat_template == theirs.chat_template


def test_templates_render_and_encode_as_with_transformers(pair: tuple[Any, Any]) -> None:
    light, theirs = pair
    own = [None] if theirs.chat_template else []
    rendered = encoded = 0
    for name in (*own, *template_names()):
        a, b = (resolve_template(tokenizer, name) for tokenizer in (light, theirs))
        assert (a.source, a.notices) == (b.source, b.notices)
        for turns in (TURNS, TURNS[1:], TURNS[1:3]):
            texts = [render(t, a, turns, prompt=turns[-1].role == "user") for t in (light, theirs)]
            assert texts[0] == texts[1]
            rendered += 1
        assert find_ending(light, a) == find_ending(theirs, b)
        # A codec copies its tokenizer, which takes long where it has many tokens.
        if find_ending(light, a) is not None and (encoded == 0 or len(light) < 10_000):
            encoded += 1
            chats = [ChatTokenizer.of(t, a) for t in (light, theirs)]
            texts = [chat.codec.render(TURNS[1:], prompt=True) for chat in chats]
            assert texts[0] == texts[1]
            assert chats[0].codec.tokenize(texts) == chats[1].codec.tokenize(texts)
    assert rendered
    assert encoded


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content | tojson }}{% if loop.first %}{% continue %}"
        "{% endif %}{{ m.role }}{% break %}{% endfor %}",
        "{% set x = 1 %}{% for m in messages %}\n  {% generation %}{% set x = 2 %}{{ m.content }}"
        "{{ x }}{% endgeneration %}{{ x }}\n{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{{ dict(a=1) | tojson(indent=2) }}",
    ],
)
def test_the_environment_is_that_of_transformers(source: str) -> None:
    messages = [turn.message() for turn in TURNS]
    (expected,), _ = render_jinja_template([messages], chat_template=source)
    ours = compile_template(source)(messages=messages, tools=None, add_generation_prompt=False)
    assert ours == expected


def test_a_folder_that_transformers_must_read_has_no_light_tokenizer(
    shared_data: Path, tmp_path: Path
) -> None:
    source = shared_data / "tokenizers" / "mistral_v1_32000"
    (tmp_path / "tokenizer.json").write_text((source / "tokenizer.json").read_text())
    config = json.loads((source / "tokenizer_config.json").read_text())
    for changes in (
        {"tokenizer_class": "T5TokenizerFast"},
        {"pad_token": "[PAD]"},
        {"auto_map": {"AutoTokenizer": ["x.Y", None]}},
        {"added_tokens_decoder": {"32000": {"content": "<new>", "special": True}}},
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | changes))
        assert read_light_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_light_tokenizer(tmp_path) is not None
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert read_light_tokenizer(tmp_path) is None


def test_encoding_a_record_loads_neither_transformers_nor_torch() -> None:
    code = (
        "import sys; from pathlib import Path; import tandem.demo.embedded as e;"
        "from tandem.data.tokenize.light_tokenizer import read_light_tokenizer as r;"
        "from tandem.data.tokenize.chat_template import resolve_template;"
        "from tandem.data.tokenize.encode import ChatTokenizer;"
        "t = r(Path(e.__file__).parent / 'base');"
        "c = ChatTokenizer.of(t, resolve_template(t, 'neural-chat'));"
        "assert c.parts is not None;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
