"""Cuts texts into tokens as llama.cpp does, by what a GGUF file says of its vocabulary alone."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from tandem.errors import UserError
from tandem.export.pre_tokenizers import KNOWN, known
from tandem.export.vocabulary import (
    BYTE,
    CONTROL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    FileVocabulary,
)

# Tokens that end an answer in llama.cpp by their text, whatever the file says.
ENDS_BY_TEXT = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>",
))  # fmt: skip
# After which of Phi-3's special tokens blanks stay.
_BLANKS_STAY = ("<unk>", "<s>", "<|endoftext|>")


class FileTokenizer:
    """The tokenizer that llama.cpp makes of a file.

    Special tokens are taken out of a text first, the longest first. What is between them is merged:
    bytes by the file's merges, or pieces by their scores.
    """

    def __init__(self, vocabulary: FileVocabulary) -> None:
        self._vocabulary = vocabulary
        self._ids = {token: index for index, token in enumerate(vocabulary.tokens)}
        special = [
            index
            for index, kind in enumerate(vocabulary.types)
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ]
        size = {index: len(vocabulary.tokens[index].encode()) for index in special}
        self._special = sorted(special, key=lambda index: -size[index])
        name = vocabulary.name.lower()
        self._strips = "phi-3" in name or "phi3" in name
        if vocabulary.model == "llama":
            self._bytes = {
                int(vocabulary.tokens[index][3:5], 16): index
                for index, kind in enumerate(vocabulary.types)
                if kind == BYTE
            }
        elif vocabulary.model == "gpt2":
            self._merged = _byte_level(vocabulary.tokens, vocabulary.merges, vocabulary.pre)
        else:
            raise UserError(
                f"the file's tokenizer is of the kind {vocabulary.model!r}; gpt2 and llama are "
                "what can be compared"
            )

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, nothing added; special tokens in it are tokens."""
        ids: list[int] = []
        after_special = True
        for part in self._parts(text):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
                continue
            if self._vocabulary.model == "gpt2":
                ids += self._merged.encode(part, add_special_tokens=False).ids
            else:
                prefix = " " if after_special and self._vocabulary.add_space_prefix else ""
                ids += self._pieces((prefix + part).replace(" ", SPACE))
            after_special = False
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """The tokens of what a chat template has rendered, with the BOS that the file adds."""
        own = self._vocabulary
        if not own.add_bos or own.bos is None:
            return self.encode(text)
        # llama.cpp takes the template's own BOS away before it adds one.
        return [own.bos, *self.encode(text.removeprefix(own.tokens[own.bos]))]

    def ends(self) -> set[int]:
        """The tokens at which llama.cpp ends an answer."""
        own = self._vocabulary
        named = {index for index in (own.eos, own.eot) if index is not None}
        return named | {self._ids[text] for text in ENDS_BY_TEXT if text in self._ids}

    def _parts(self, text: str) -> list[str | int]:
        parts: list[str | int] = [text] if text else []
        for index in self._special:
            token = self._vocabulary.tokens[index]
            if token not in text:
                continue
            cut: list[str | int] = []
            for part in parts:
                cut += [part] if isinstance(part, int) else self._cut(part, token, index)
            parts = cut
        return parts

    def _cut(self, text: str, token: str, index: int) -> Iterator[str | int]:
        pieces = text.split(token)
        for number, piece in enumerate(pieces):
            if number:
                yield index
                if self._strips and token not in _BLANKS_STAY:
                    piece = piece.lstrip(" \t\n\v\f\r")
            if piece:
                yield piece

    def _pieces(self, text: str) -> list[int]:
        """Merge characters by the scores of what they make, the highest first, then bytes."""
        symbols: list[str] = list(text)
        before = list(range(-1, len(symbols) - 1))
        after = [*range(1, len(symbols)), -1]
        made: dict[str, tuple[str, str]] = {}
        queue: list[tuple[float, int, int, int]] = []

        def consider(left: int, right: int) -> None:
            if left < 0 or right < 0:
                return
            index = self._ids.get(symbols[left] + symbols[right])
            if index is not None:
                made[symbols[left] + symbols[right]] = (symbols[left], symbols[right])
                size = len(symbols[left]) + len(symbols[right])
                heapq.heappush(queue, (-self._vocabulary.scores[index], left, right, size))

        for place in range(1, len(symbols)):
            consider(place - 1, place)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            whole = len(symbols[left]) + len(symbols[right])
            if not symbols[left] or not symbols[right] or whole != size:
                continue
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            consider(before[left], left)
            consider(left, after[left])
        return [index for symbol in symbols if symbol for index in self._resolved(symbol, made)]

    def _resolved(self, symbol: str, made: dict[str, tuple[str, str]]) -> list[int]:
        if symbol in self._ids:
            return [self._ids[symbol]]
        if symbol in made:
            return [index for part in made[symbol] for index in self._resolved(part, made)]
        missing = [byte for byte in symbol.encode() if byte not in self._bytes]
        if missing:
            raise UserError(
                f"the file has no token for the byte {missing[0]:#04x}; llama.cpp would stop there"
            )
        return [self._bytes[byte] for byte in symbol.encode()]


@lru_cache(maxsize=1)  # a large one takes seconds, and is asked for several times
def _byte_level(tokens: tuple[str, ...], merges: tuple[str, ...], pre: str) -> Any:
    """The tokenizer of a file's merges, which cuts texts by llama.cpp's expressions."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as InOrder

    cut = known(pre)
    if cut is None:
        raise UserError(
            f"the file's tokenizer.ggml.pre is {pre or 'missing'!r}; what llama.cpp "
            f"does then is not known here, so it cannot be compared. Known: {', '.join(KNOWN)}"
        )
    ids = {token: index for index, token in enumerate(tokens)}
    try:
        model = BPE(ids, [_pair(merge) for merge in merges], ignore_merges=cut.whole_words)
    except Exception as error:  # a bare Exception of the library
        raise UserError(f"the file's merges do not fit its tokens: {error}") from None
    tokenizer = Tokenizer(model)
    splits = [Split(Regex(expression), "isolated") for expression in cut.of_llama_cpp]
    tokenizer.pre_tokenizer = InOrder([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")
    return merge[:1] + left, right


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """The place of the first token that differs, the shorter length where one is the start."""
    pairs = zip(ours, theirs, strict=False)
    return next(
        (place for place, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs))
    )
