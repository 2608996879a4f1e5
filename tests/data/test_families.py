"""Tokenizer families times templates: answers follow exactly what inference feeds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import trainers as train
from transformers import PreTrainedTokenizerFast

from tandem.data.records import Origin, Turn
from tandem.data.tokenize.chat_template import missing_tokens, resolve_template, template_names
from tandem.data.tokenize.encode import ChatTokenizer, Encoded, Exchange, encode_exchanges
from tandem.data.tokenize.vocabulary import add_tokens
from tandem.errors import UserError

CORPUS = ["Hello there, what is two and two? It is four.\n\n### User: yes or no"] * 20
SPECIAL = ["<s>", "</s>", "<unk>"]
# A reasoning template, whose past answers lose their thoughts: no prefix of itself.
REASONING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
    "A: {{ m.content.split('</think>')[-1] }}{{ eos_token }}\n"
    "{% elif m.role == 'assistant' %}A: {{ m.content }}{{ eos_token }}\n"
    "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
# Its generation prompt ends with a blank that answers are written behind.
BLANK = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
QUESTION = (Turn("user", "two and two?"),)
DIALOGUE = (
    Turn("user", "Hello  there,"), Turn("assistant", "<think>two</think>It is four."),
    Turn("user", "\u00e9 yes or no \U0001f600"),
)  # fmt: skip


def fast(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = train.BpeTrainer(
        vocab_size=350, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return fast(tokenizer)


def flagged() -> Any:
    """With added tokens that eat blanks around them, and one that is normalised."""
    tokenizer = byte_level()
    tokenizer.add_tokens(
        [
            AddedToken("User", lstrip=True, rstrip=True, normalized=False),
            AddedToken("four", normalized=True),
            AddedToken("assistant", rstrip=True, special=True),
        ]
    )
    return tokenizer


def unigram(scheme: str) -> Any:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = train.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return fast(tokenizer)


def word_piece() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = train.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return fast(tokenizer)


FAMILIES = ("mistral", "stories", "byte-level", "flagged", "first", "always", "word-piece")


@pytest.fixture(scope="module")
def families(_mistral: Any, _stories: Any) -> dict[str, Any]:
    return {
        "mistral": _mistral, "stories": _stories, "byte-level": byte_level(),
        "flagged": flagged(), "first": unigram("first"), "always": unigram("always"),
        "word-piece": word_piece(),
    }  # fmt: skip


# A copy of the large tokenizer takes long, and the other SentencePiece one has all templates.
CASES = [
    (family, name)
    for family in FAMILIES
    for name in (*template_names(), "reasoning", "blank")
    if family != "mistral" or name in ("mistral", "chatml", "neural-chat")
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_what_is_trained_follows_what_is_fed(
    family: str, name: str, families: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(families[family])
    choice = name
    if source := {"reasoning": REASONING, "blank": BLANK}.get(name):
        path = tmp_path / f"{name}.jinja"
        path.write_text(source)
        choice = str(path)
    template = resolve_template(tokenizer, choice)
    if name in ("chatml", "llama-3"):
        with pytest.raises(UserError, match="added_tokens"):
            ChatTokenizer.of(tokenizer, template).ending_for("")
        assert add_tokens(tokenizer, missing_tokens(tokenizer, template))
    chat = ChatTokenizer.of(tokenizer, template)
    for before in (QUESTION, DIALOGUE):
        messages = [{"role": turn.role, "content": turn.content} for turn in before]
        fed = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert fed.count(tokenizer.bos_token_id) == text.count(tokenizer.bos_token)
        answers = ["It is four.", " yes", "no"]
        for found in encode_exchanges(
            chat, [Exchange(before, answer, Origin("f", 1)) for answer in answers]
        ):
            assert isinstance(found, Encoded), found
            assert found.ids[: found.start] == fed
            assert found.ids[-1] == chat.ending.token_id
            assert chat.ending.token_id not in found.ids[found.start : -1]
            cut = found.cut(len(found.ids) - 1)
            assert chat.ending.token_id not in cut.ids[cut.start :]
