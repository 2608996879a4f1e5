"""A file's vocabulary gives the tokens of the model's tokenizer, on real tokenizers and texts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tandem.data.tokenize.chat_template import resolve_template, tokenize
from tandem.errors import UserError
from tandem.export.compare_tokens import (
    ChatModel,
    _compare_ends,
    compare_tokens,
    settle_prefix,
)
from tandem.export.file_tokenizer import FileTokenizer
from tandem.export.ollama import choose_template
from tandem.export.pre_tokenizers import KNOWN, name_of
from tandem.export.probes import RARE
from tandem.export.vocabulary import FileVocabulary, vocabulary_of
from tandem.model.model_folder import load_tokenizer, model_folder


def _chat(folder: Path, template: str | None, rows: int | None = None) -> ChatModel:
    tokenizer = load_tokenizer(folder)
    return ChatModel(tokenizer, resolve_template(tokenizer, template), (), rows or len(tokenizer))


def _vocabulary(chat: ChatModel) -> FileVocabulary:
    made, _ = vocabulary_of(chat.tokenizer, chat.template, chat.rows, "model")
    return settle_prefix(made, chat)


@pytest.fixture(scope="module")
def qwen(shared_data: Path) -> tuple[ChatModel, FileVocabulary]:
    chat = _chat(shared_data / "tokenizers" / "qwen3", None)
    return chat, _vocabulary(chat)


def test_pieces_of_a_real_tokenizer_are_the_same_in_a_file(shared_data: Path) -> None:
    chat = _chat(shared_data / "tokenizers" / "mistral_v1_32000", "mistral")
    own = _vocabulary(chat)
    assert (own.model, own.add_bos, own.add_space_prefix) == ("llama", True, True)
    compare_tokens(own, chat)
    _compare_texts(FileTokenizer(own), chat, shared_data)


def test_merges_of_a_real_tokenizer_are_the_same_in_a_file(
    qwen: tuple[ChatModel, FileVocabulary], shared_data: Path
) -> None:
    """And its template, with tools and thinking, writes plain conversations as ChatML does."""
    chat, own = qwen
    assert (own.model, own.pre, own.add_bos) == ("gpt2", "qwen2", False)
    _compare_texts(FileTokenizer(own), chat, shared_data)
    name, text = choose_template(own, chat)
    assert name == "chatml"
    assert text.endswith("<|im_start|>assistant\n")


def _compare_texts(there: FileTokenizer, chat: ChatModel, shared_data: Path) -> None:
    with (shared_data / "conversations" / "slimorca_format.jsonl").open() as file:
        rows = [json.loads(next(file)) for _ in range(40)]
    texts = [turn["value"][:400] for row in rows for turn in row["conversations"]]
    assert len(texts) > 80
    assert [there.encode(text) for text in texts] == tokenize(chat.tokenizer, texts)


def test_pieces_merge_by_scores_in_the_order_of_the_merges(stories_path: Path) -> None:
    """The best pair first; what is no piece goes by its bytes; blanks only after special tokens."""
    own = FileVocabulary(
        "llama",
        ("<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "ab", "▁a", "bb", "▁ab"),
        (2, 3, 3, 6, 6, 1, 1, 1, 1, 1, 1, 1),
        scores=(0, 0, 0, 0, 0, -9, -9, -9, -1, -2, -3, -4),
        add_space_prefix=True, bos=1, eos=2,
    )  # fmt: skip
    there = FileTokenizer(own)
    # ab is better than ▁a: ▁ + ab, which make ▁ab.
    assert there.encode("ab") == [11]
    assert there.encode("abb") == [11, 7]
    assert there.encode("aé</s>b") == [9, 3, 4, 2, 5, 7]
    assert FileTokenizer(replace(own, add_space_prefix=False)).encode("ab</s>b") == [8, 2, 7]
    with pytest.raises(UserError, match="no token for the byte 0xf0"):
        there.encode("🙂")
    scores = _vocabulary(_chat(stories_path, "neural-chat"))
    first = ["▁t", "he", "▁a"]
    assert [scores.scores[scores.tokens.index(token)] for token in first] == [0.0, -1.0, -2.0]


def test_a_blank_in_front_is_there_where_conversations_have_it(stories_path: Path) -> None:
    """transformers' newer tokenizers put it at the start alone, and so nowhere behind a BOS."""
    chat = _chat(stories_path, "neural-chat")
    assert _vocabulary(chat).add_space_prefix
    backend = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    backend["normalizer"] = None
    backend["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    from tokenizers import Tokenizer

    chat.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    own = _vocabulary(chat)
    assert not own.add_space_prefix
    compared = compare_tokens(own, chat)
    assert any("no blank in front" in remark for remark in compared.remarks)


def test_texts_that_llama_cpp_cuts_otherwise_are_named(
    qwen: tuple[ChatModel, FileVocabulary],
) -> None:
    """Qwen's tokenizer composes letters and their signs first; llama.cpp does not."""
    chat, own = qwen
    compared = compare_tokens(own, chat)
    assert compared.conversations == 8
    assert compared.remarks[0].startswith(f"llama.cpp cuts {RARE[1]!r} otherwise")


def _demo() -> Any:
    return _chat(model_folder("demo:base"), "zephyr")


def test_merges_in_another_order_are_refused() -> None:
    chat = _demo()
    own = _vocabulary(chat)
    with pytest.raises(UserError, match="other tokens"):
        compare_tokens(replace(own, merges=own.merges[::-1]), chat)


def test_another_pre_tokenizer_is_refused(qwen: tuple[ChatModel, FileVocabulary]) -> None:
    chat, own = qwen
    with pytest.raises(UserError, match=r"has other tokens"):
        compare_tokens(replace(own, pre="gpt-2"), chat)
    with pytest.raises(UserError, match="pre is 'cl100k'; what"):
        compare_tokens(replace(own, pre="cl100k"), chat)


def test_tokens_that_are_not_the_models_are_refused() -> None:
    chat = _demo()
    own = _vocabulary(chat)
    with pytest.raises(UserError, match=r"token 5 is 'x!' in the file and '\"' in the model"):
        compare_tokens(replace(own, tokens=(*own.tokens[:5], "x!", *own.tokens[6:])), chat)
    with pytest.raises(UserError, match="2047 tokens, and the model 2048 rows"):
        compare_tokens(replace(own, tokens=own.tokens[:-1]), chat)
    renamed = tuple("</z>" if token == "</s>" else token for token in own.tokens)
    with pytest.raises(UserError, match="does not stop there"):
        _compare_ends(FileTokenizer(replace(own, tokens=renamed, eos=1, eot=None)), chat)


def test_rows_without_a_token_are_padding_and_tokens_without_a_row_are_left_out() -> None:
    chat = _chat(model_folder("demo:base"), "zephyr", 2050)
    own = _vocabulary(chat)
    assert own.tokens[-2:] == ("[PAD2048]", "[PAD2049]")
    assert own.types[-2:] == (5, 5)
    compare_tokens(own, chat)
    fewer = _chat(model_folder("demo:base"), "zephyr", 2040)
    made, notices = vocabulary_of(fewer.tokenizer, fewer.template, 2040, "model")
    assert len(made.tokens) == 2040
    assert "8 tokens have no row" in notices[0]


def test_the_pre_tokenizer_of_a_real_tokenizer_is_known(shared_data: Path) -> None:
    path = shared_data / "tokenizers" / "deepseek_v3" / "tokenizer.json"
    steps = json.loads(path.read_text())["pre_tokenizer"]
    assert name_of(steps, whole_words=False) == "deepseek-v3"


def test_names_of_pre_tokenizers_are_found_by_their_expressions() -> None:
    def split(expression: str) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated",
                "invert": False}  # fmt: skip

    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    for name, one in KNOWN.items():
        steps = {"type": "Sequence", "pretokenizers": [*map(split, one.expressions), bytes_]}
        assert name_of(steps, whole_words=one.whole_words) == name
    llama = split(KNOWN["llama-bpe"].expressions[0].replace("{1,3}", "{1,2}"))
    assert name_of({"type": "Sequence", "pretokenizers": [llama, bytes_]}, whole_words=True) is None
    assert name_of({**bytes_, "use_regex": True}, whole_words=False) == "gpt-2"
    assert name_of({"type": "Whitespace"}, whole_words=False) is None
    assert name_of(None, whole_words=False) is None
