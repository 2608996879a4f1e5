"""Fixed prompts, answered by the model as it stands, before the first step and with checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tandem.model.attention.own_attention import by_own_attention
from tandem.model.generate import GeneratedAnswer, Sampling
from tandem.storage.atomic_files import append_jsonl
from tandem.train.callbacks.callback import Callback, TrainingRun
from tandem.train.checkpoint import forget_after

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class AskedPrompt:
    """A prompt: what a reader sees of it, and its tokens."""

    text: str
    ids: Sequence[int]
    system: str = ""


@dataclass
class AnswerPrompts(Callback):
    """Writes a line of samples.jsonl for each prompt and time.

    It draws nothing at random and leaves gradients and optimizer alone, so that training does not
    depend on it. It comes before the callback that writes checkpoints: where one is, answers are.
    """

    prompts: Sequence[AskedPrompt]
    every: int  # steps from one checkpoint to the next
    max_new_tokens: int
    stop_ids: Sequence[int]
    decode: Callable[[list[int]], str]

    def on_train_begin(self, run: TrainingRun) -> None:
        """Forget answers beyond the step that the run resumes from; answer before the first one."""
        first = run.state.step == 0
        known = -1 if first else run.state.step
        run.on_rank0(lambda: forget_after(run.folder / SAMPLES, known))
        if first:
            self._answer(run)

    def before_next_step(self, run: TrainingRun) -> None:
        """Answer where a checkpoint is due; a run that is asked to stop does not wait for it."""
        step = run.state.step
        if step % self.every == 0 or step >= run.total_steps or run.finish_reason:
            self._answer(run)

    def on_train_end(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        """Say in summary.json how many prompts there were, and what they cost."""
        summary["samples"] = {"prompts": len(self.prompts), "seconds": run.state.sample_seconds}

    def _answer(self, run: TrainingRun) -> None:
        engine, model, began = run.engine, run.engine.model, time.perf_counter()
        device = engine.device
        model.eval()
        with (
            engine.result_in_place(),
            by_own_attention(model, compiled=run.execution["compiled"]),
            torch.autocast(device.kind, device.autocast, enabled=device.autocast is not None),
        ):
            answers = engine.answers(
                [prompt.ids for prompt in self.prompts],
                self.stop_ids,
                Sampling(self.max_new_tokens),
            )
        model.train()
        run.state.sample_seconds += time.perf_counter() - began
        run.on_rank0(lambda: self._write(run, answers or []))

    def _write(self, run: TrainingRun, answers: Sequence[GeneratedAnswer]) -> None:
        for number, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True)):
            line = {
                "step": run.state.step,
                "epoch": run.epoch,
                "number": number,
                **({"system": prompt.system} if prompt.system else {}),
                "prompt": prompt.text,
                "answer": self.decode(list(answer.ids)).strip(),
                "tokens": len(answer.ids),
                "ended": answer.stopped,  # by itself, before max_new_tokens
            }
            append_jsonl(run.folder / SAMPLES, line)
