"""Stream one answer: tokens from transformers' generate, growing text to a callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from tandem.model.generate import Sampling

Ended = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """The text of an answer, its length in tokens, and why it ended."""

    text: str
    tokens: int
    ended: Ended


def stream_answer(
    model: Any,
    tokenizer: Any,
    prompt: Sequence[int],
    *,
    stop: Sequence[int],
    sampling: Sampling,
    seed: int | None,
    on_text: Callable[[str], None],
) -> StreamedAnswer:
    """Generate after `prompt` (token ids) until a `stop` id or `max_new_tokens`.

    `on_text` gets each new piece of text. Ctrl-C ends the answer and keeps its text so far. With a
    `seed` the same prompt gives the same answer on the same device.
    """
    if seed is not None:
        torch.manual_seed(seed)
    text = _TextStream(tokenizer, stop, on_text)
    input_ids = torch.tensor([list(prompt)], device=model.device)
    interrupted = False
    try:
        with torch.inference_mode():
            model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=_config(model, stop, sampling),
                streamer=text,
            )
    except KeyboardInterrupt:
        interrupted = True
    text.flush()
    ended: Ended = "stop" if text.stopped else "length"
    return StreamedAnswer(text.text, text.tokens, "interrupted" if interrupted else ended)


def model_stop_ids(model: Any) -> list[int]:
    """Return the ids at which the model's own generation config ends an answer."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        return []
    return [int(ids)] if isinstance(ids, int) else [int(i) for i in ids]


class _TextStream(BaseStreamer):
    """Turns the tokens of generate, one by one, into pieces of text."""

    def __init__(self, tokenizer: Any, stop: Sequence[int], on_text: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._stop = set(stop)
        self._on_text = on_text
        self._ids: list[int] = []
        self._prompt_seen = False
        # ids[:_read] are printed; ids[_start:_read] are decoded again before each new piece,
        # because a token's text can depend on the one before (spaces, characters of many bytes).
        self._start = self._read = 0
        self.text = ""
        self.stopped = False

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            if token in self._stop:
                self.stopped = True
                return
            self._ids.append(token)
            self._emit(final=False)

    def end(self) -> None:
        """Nothing: `flush` is called by the owner, also after an interruption."""

    def flush(self) -> None:
        self._emit(final=True)

    def _emit(self, *, final: bool) -> None:
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return
        piece = now[len(before) :]
        self._start, self._read = self._read, len(self._ids)
        self.text += piece
        self._on_text(piece)

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def _config(model: Any, stop: Sequence[int], sampling: Sampling) -> GenerationConfig:
    own = getattr(model, "generation_config", None)
    greedy = sampling.temperature == 0
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not greedy,
        # Stated, because the model's own config would replace missing values and change the draw.
        temperature=1.0 if greedy else sampling.temperature,
        top_p=1.0 if greedy else sampling.top_p,
        top_k=0 if not greedy else 50,
        num_beams=1,
        repetition_penalty=getattr(own, "repetition_penalty", None) or 1.0,
        eos_token_id=list(stop),
        pad_token_id=stop[0] if stop else 0,
    )
