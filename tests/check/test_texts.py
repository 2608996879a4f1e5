"""Guesses and signs of single texts, with what must not be taken for them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.check.duplicates import signatures
from tandem.check.findings import KEYS, credentials, excerpt, masked
from tandem.check.record_signs import breaks_off, leaves_code_open
from tandem.check.text_signs import TextSigns
from tandem.data.text.text_traits import LANGUAGES, language_of, refuses
from tandem.data.text.word_hashes import hash_words

_PROSE = "The bridge was closed for repairs. Everybody had to take the ferry instead of it. " * 2


@pytest.mark.parametrize(
    ("answer", "broken"),
    [
        (_PROSE + "After that nobody in the town was sure whether the", True),
        (_PROSE + "After that they had bread, cheese, some apples, and,", True),
        (_PROSE + "After that nobody in the town was sure.", False),
        ("Paris", False),
        ("the town on the river with the bridge that was closed for all of the long winter", False),
        (_PROSE + "\n- bread that was baked in the morning of the day before the feast", False),
        (_PROSE + "For details see https://bridges.org/all/about/town and the rest of it", False),
        (_PROSE + "I hope to hear from you soon. Yours sincerely, Jane Roe of the bridge", False),
        (_PROSE + "```\nthe code of the thing that we have been talking about\n```", False),
        (_PROSE + "The answer to it is x = 4 and nothing else in the whole wide world", False),
    ],
)  # fmt: skip
def test_answers_that_break_off(answer: str, broken: bool) -> None:
    assert breaks_off(answer) == broken


def test_code_blocks_left_open() -> None:
    assert leaves_code_open("So:\n```python\nx = 1\n")
    assert not leaves_code_open("So:\n```python\nx = 1```")
    assert not leaves_code_open("no code")


_SECRETS = {
    "AWS access key": "AKIAIOSFODNN7EXAMPLQ",
    "GitHub token": "ghp_" + "a1B2" * 9,
    "Anthropic key": "sk-ant-" + "a1B2" * 8,
    "OpenAI key": "sk-proj-" + "a1B2" * 8,
    "Stripe key": "sk_live_" + "a1B2" * 6,
    "Hugging Face token": "hf_" + "aBcD" * 8,
    "Slack token": "xoxb-" + "12345-" * 3 + "ab",
    "Google API key": "AIza" + "a1B2-" * 7,
    "JSON Web Token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVP-mB92K27",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIEow" + "IBAAKC" * 5 + "\n",
}


@pytest.mark.parametrize("kind", _SECRETS)
def test_secrets_of_each_kind_are_found_and_masked(kind: str) -> None:
    text = f"the key is {_SECRETS[kind]}"
    assert [found for found, _ in credentials(text)] == [kind]
    assert len(masked(text)) == len(text)
    assert _SECRETS[kind][32:].strip() not in masked(text) or len(_SECRETS[kind]) <= 32
    assert "****" in masked(text)
    assert not list(credentials(masked(text)))


def test_every_kind_of_secret_is_tested() -> None:
    assert {shape.kind for shape in KEYS} == set(_SECRETS)


@pytest.mark.parametrize(
    "text",
    [
        "task-oriented, sk-learn-style-naming-of-long-options",
        "AKIA is a prefix",
        "the hf_transfer package",
        "-----BEGIN PUBLIC KEY-----\nMIIB",
        "a@b and user@example.com or you@mail.example.org",
        "R&D and AT&T",
        "use &amp; in <b>HTML</b>",
        "a\r\nb\tc",
        "SÃO PAULO, à côté, Â, Ångström, naïve café",
        "the flag \U0001f468\u200d\U0001f469\u200d\U0001f467 of a family",
        "## A heading\n### User guide\ntext",
        "Write it.\n\n### Instruction\n\nExplain tides.",
        "### Response: 200\n\nThe page is there.",
        "f <| x |> g, and a<|b",
        "\n\nAssistant: comes first\n\nHuman: and then",
        "Human: said he,\n\nis what we are",
    ],
)
def test_what_is_no_sign(text: str) -> None:
    assert list(TextSigns(("<unk>",)).find(["clean", text])) == []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("caf\u00c3\u00a9", "mojibake"),
        ("it\u00e2\u20ac\u2122s", "mojibake"),
        ("it\u00e2\u0080\u0099s", "mojibake"),
        ("20 \u00c2\u00b0C", "mojibake"),
        ("a\rb", "control_characters"),
        ("a\x00b", "control_characters"),
        ("a\u0096b", "control_characters"),
        ("\ufeffa", "invisible_characters"),
        ("it&#x27;s", "html_entities"),
        ("<|im_start|>user", "template_tokens"),
        ("[INST] why [/INST]", "template_tokens"),
        ("the end</s>", "template_tokens"),
        ("why?\n### Assistant:\nso", "template_tokens"),
        ("<|begin_of_thought|>\n\nso", "template_tokens"),
        ("<|prompter|>why", "template_tokens"),
        ("<\uff5cUser\uff5c>why", "template_tokens"),
        ("Human: why?\n\nAssistant: so\n\nHuman: and?", "template_tokens"),
        ("Why?\n\nHuman: why?\n\nAssistant:", "template_tokens"),
        ("### Human: why?### Assistant: so", "template_tokens"),
        ("Below is a task.\n\n### Instruction:\nwhy?\n\n### Response:\nso", "template_tokens"),
        ("why?\n\n### Response:\n", "template_tokens"),
        ("an <unk> one", "special_tokens"),
    ],
)
def test_each_damage_is_found_where_it_is(text: str, name: str) -> None:
    found = list(TextSigns(("<unk>",)).find(["clean", text]))
    assert (1, name) in [(number, sign.name) for number, sign, _, _ in found]


def test_an_endless_text_is_searched_in_one_go() -> None:
    """Patterns that look again from every position would take hours here."""
    text = "a.b-" * 500_000 + "@" + "&" + "s>" + "<|" + " sk-" + "\n### " * 1000 + "eyJ" * 100_000
    assert list(TextSigns(("<unk>",)).find([text])) == []
    assert not breaks_off(text)
    assert not refuses(text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=60), max_size=6))
def test_any_text_can_be_looked_at(texts: list[str]) -> None:
    for number, _, at, _ in TextSigns(("<unk>",)).find(texts):
        assert 0 <= at <= len(texts[number])
    words = hash_words(texts)
    assert len(words.starts) == len(texts) + 1
    assert words.starts[-1] == len(words.hashes)
    assert signatures(words).shape == (len(texts), 60)
    for text in texts:
        assert language_of(text) is None or language_of(text) in LANGUAGES
        assert all(c.isprintable() for c in excerpt(text, len(text) // 2))


def test_excerpts_are_one_short_line_in_which_all_can_be_seen() -> None:
    text = "x" * 500 + "\n\n  \x07here\u200b " + "y" * 500
    shown = excerpt(text, text.index("here"))
    assert "\n" not in shown
    assert "\\x07here\\u200b" in shown
    assert len(shown) < 120
    key = "AKIAIOSFODNN7EXAMPLQ"
    for position in (0, 30, 85, 88, 95):
        assert key[8:] not in excerpt("z " * position + key + " end", 2 * position + 10)
