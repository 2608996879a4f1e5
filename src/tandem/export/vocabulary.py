"""A tokenizer as a GGUF file has it: made of a model's, to be written or to be compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tandem.data.tokenize.chat_template import ChatTemplate, find_ending, prompt_ids
from tandem.errors import UserError
from tandem.export.pre_tokenizers import KNOWN, name_of
from tandem.export.probes import CONVERSATIONS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens, as llama.cpp numbers them."""
SPACE = "▁"
# Scores of tokens that no merge makes: they are below all others.
_NEVER = -1e6


@dataclass(frozen=True)
class FileVocabulary:
    """The tokenizer of a GGUF file.

    `model` is gpt2 (merges of bytes) or llama (scores of pieces, as SentencePiece has them).
    """

    model: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    pre: str = ""
    add_bos: bool = False
    add_space_prefix: bool = False
    bos: int | None = None
    eos: int | None = None
    eot: int | None = None
    unknown: int | None = None
    padding: int | None = None
    templates: Mapping[str, str] = field(default_factory=dict)  # by name; the main one is default
    name: str = ""  # general.name, which llama.cpp looks into for Phi-3


def vocabulary_of(
    tokenizer: Any, template: ChatTemplate, rows: int, name: str
) -> tuple[FileVocabulary, list[str]]:
    """The tokenizer of a model with so many rows, as a file has it, and what to tell the user.

    Raises UserError for a tokenizer that llama.cpp cannot be told of.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            "the tokenizer has no tokenizer.json form, which GGUF's vocabulary is made of. Save "
            "it with transformers' fast tokenizers."
        )
    content = json.loads(backend.to_str())
    tokens, notices = _tokens(tokenizer, rows)
    added = {int(one["id"]): bool(one["special"]) for one in content["added_tokens"]}
    pieces = _is_pieces(content)
    unknown = tokenizer.get_vocab().get(content["model"].get("unk_token") or "")
    types = tuple(
        _type(index, token, added, unknown if pieces else None) for index, token in tokens.items()
    )
    ending = find_ending(tokenizer, template)
    begins = prompt_ids(tokenizer, template, CONVERSATIONS[0])[:1]
    common: dict[str, Any] = {
        "tokens": tuple(token or f"[PAD{index}]" for index, token in tokens.items()),
        "types": types,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": None if ending is None else ending.token_id,
        "unknown": unknown,
        "padding": getattr(tokenizer, "pad_token_id", None),
        # llama.cpp puts this token in front of all that a template renders, or of none.
        "add_bos": tokenizer.bos_token_id is not None and begins == [tokenizer.bos_token_id],
        "templates": dict(template.named) or {"default": template.source},
        "name": name,
    }
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in _merges(content)]
    if pieces:
        scores = _scores(content, common["tokens"])
        return FileVocabulary("llama", scores=scores, add_space_prefix=True, **common), notices
    pre = name_of(content["pre_tokenizer"], whole_words=bool(content["model"].get("ignore_merges")))
    if pre is None:
        raise UserError(
            "the tokenizer cuts texts in a way for which llama.cpp has no name that is known here "
            f"({', '.join(KNOWN)}). A file with another name would give other tokens. llama.cpp's "
            "own convert_hf_to_gguf.py may know it; its file would not be compared with the model."
        )
    if (content["normalizer"] or {}).get("type") == "NFC":
        notices.append(
            "the tokenizer puts texts into the composed form of Unicode (NFC) first; llama.cpp "
            "does not, so a text in decomposed form gets other tokens there"
        )
    return FileVocabulary("gpt2", merges=tuple(merges), pre=pre, **common), notices


def _tokens(tokenizer: Any, rows: int) -> tuple[dict[int, str | None], list[str]]:
    """Each row's token, None where the tokenizer has none, and a notice about others."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = {index: by_id.get(index) for index in range(rows)}
    left = sorted(index for index in by_id if index >= rows)
    notices = []
    if left:
        named = ", ".join(f"{by_id[index]!r} ({index})" for index in left[:3])
        notices.append(
            f"{len(left)} tokens have no row in the model and are left out of the file: {named}"
        )
    twice = [token for token, count in Counter(filter(None, tokens.values())).items() if count > 1]
    if twice:
        raise UserError(
            f"the vocabulary has {twice[0]!r} twice, and llama.cpp loads no such file. Correct "
            "tokenizer.json."
        )
    return tokens, notices


def _is_pieces(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is that of a SentencePiece model, and no kind unknown here."""
    model = content["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"the tokenizer is of the kind {model['type']}; GGUF files are written for byte-level "
            "BPE and for SentencePiece's BPE. llama.cpp's convert_hf_to_gguf.py may know it."
        )
    return bool(model.get("byte_fallback"))


def _merges(content: Mapping[str, Any]) -> Sequence[Any]:
    merges: Sequence[Any] = content["model"]["merges"]
    return merges


def _type(index: int, token: str | None, added: Mapping[int, bool], unknown: int | None) -> int:
    if token is None:
        return UNUSED
    if index == unknown:
        return UNKNOWN
    if index in added:
        return CONTROL if added[index] else USER_DEFINED
    if unknown is not None and len(token) == 6 and token.startswith("<0x") and token[-1] == ">":
        return BYTE
    return NORMAL


def _scores(content: Mapping[str, Any], tokens: Sequence[str]) -> tuple[float, ...]:
    """Scores that merge pieces in the order of the tokenizer's merges: each token's first rank.

    SentencePiece merges the pair of the highest score, tokenizers that of the lowest rank.
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_merges(content)):
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        ranks.setdefault(left + right, rank)
    return tuple(-float(ranks[token]) if token in ranks else _NEVER for token in tokens)
