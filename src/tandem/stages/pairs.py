"""Between the stages: preference pairs, with rejected answers written by the weaker model."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.artifact.files import atomic_write_json, atomic_write_text
from tandem.artifact.hashing import hash_weights
from tandem.artifact.lock import folder_lock
from tandem.artifact.manifest import finish_stage, open_stage, start_stage
from tandem.data.chunks import Row
from tandem.data.ledger import Ledger
from tandem.data.reading import read_conversations, read_questions
from tandem.data.records import Origin, Turn
from tandem.data.sources import SourceSpec, read_rows
from tandem.data.template import prompt_ids, resolve_template, stop_ids
from tandem.errors import UserError
from tandem.model.generate import generate_answers
from tandem.model.load import context_length, load_model, load_tokenizer, model_folder
from tandem.pairs.filter import Candidate, choose_rejected
from tandem.recipe.schema import Pairs
from tandem.stages.sources import data_identity, source_specs
from tandem.train.device import choose_device
from tandem.train.progress import phase, say
from tandem.train.runtime import Runtime

# Held-out prompts are sampled with seeds of their own.
_HELDOUT_SEED = 2**20


@dataclass(frozen=True)
class Prompt:
    """What is asked, the set's own answer, and the texts a right answer contains, if known."""

    turns: tuple[Turn, ...]
    answer: str
    accepted: tuple[str, ...]
    origin: Origin


def run_pairs(
    *,
    model: str,
    settings: Pairs,
    output_dir: Path,
    seed: int,
    runtime: Runtime,
    console: Console,
) -> Path:
    """Write pairs.jsonl (and heldout.jsonl) in the orca_dpo_pairs form; returns the folder.

    Args:
        model: the weaker model, asked in its own chat template.
        settings: prompts, sampling and filter.
        output_dir: the stage's folder.
        seed: of the sampling.
        runtime: device and dtype.
        console: for progress.

    Raises UserError for prompts that cannot be used and when no pair is left.
    """
    folder = model_folder(model)
    sources = source_specs(settings.prompts, output_dir.parent, seed)
    heldout = source_specs(settings.heldout, output_dir.parent, seed)
    inputs = {
        "model": hash_weights(folder),
        "prompts": data_identity(sources),
        "heldout": data_identity(heldout),
        "settings": settings.model_dump(mode="json", exclude={"prompts", "heldout", "model"}),
        "seed": seed,
    }
    with folder_lock(output_dir):
        if open_stage(output_dir, "pairs", inputs).state == "finished":
            say(console, f"pairs: {output_dir} is finished with these inputs; nothing to do")
            return output_dir
        start_stage(output_dir, "pairs", inputs, {"model": model})
        device = choose_device(runtime.device, runtime.dtype, runtime.hpu)
        maker = _Maker(
            load_model(folder, dtype=device.weights, device=device.torch_device),
            load_tokenizer(folder),
            settings,
            Ledger(output_dir / "data-ledger.jsonl"),
            output_dir,
            console,
        )
        summary = maker.write("pairs", sources, seed)
        outputs = ["pairs.jsonl", "summary.json"]
        if heldout:
            summary["heldout"] = maker.write("heldout", heldout, seed + _HELDOUT_SEED)
            outputs.append("heldout.jsonl")
        else:  # an earlier start may have had some
            (output_dir / "heldout.jsonl").unlink(missing_ok=True)
        maker.ledger.write()
        summary["ledger"] = maker.ledger.summary()
        atomic_write_json(output_dir / "summary.json", summary)
        finish_stage(output_dir, outputs)
    return output_dir


def read_prompts(sources: Sequence[SourceSpec], keep: str, ledger: Ledger) -> list[Prompt]:
    """Prompts with their answers, from questions or from conversations' first exchanges.

    Conversations that cannot be used go to the ledger.

    Raises UserError when keep is "wrong" and a source does not say what is right.
    """
    prompts: list[Prompt] = []
    for source in sources:
        first = next((row for row in read_rows(source) if isinstance(row, Row)), None)
        if first is not None and {"question", "answer"} <= first.fields.keys():
            questions = read_questions([source])
            prompts += [Prompt(q.turns, q.answer, q.accepted, q.origin) for q in questions]
            continue
        if keep == "wrong":
            raise UserError(
                f"{source.path}: pairs.keep is `wrong`, which needs rows of `question`, `answer` "
                "and `accepted`; use keep: different for conversations"
            )
        for conversation in read_conversations([source], ledger):
            turns = conversation.turns
            if conversation.tools or any(turn.extra or turn.role == "tool" for turn in turns):
                ledger.dropped(conversation.origin, "pairs are not made of exchanges with tools")
                continue
            end = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
            prompts.append(Prompt(turns[:end], turns[end].content, (), conversation.origin))
    return prompts


@dataclass(frozen=True)
class _Maker:
    """The loaded weaker model and where its pairs go."""

    model: Any
    tokenizer: Any
    settings: Pairs
    ledger: Ledger
    folder: Path
    console: Console

    def write(self, name: str, sources: Sequence[SourceSpec], seed: int) -> dict[str, Any]:
        """Write `name`.jsonl from some prompts; returns the counts for the summary."""
        began = time.perf_counter()
        read = read_prompts(sources, self.settings.keep, self.ledger)
        prompts, asked = self._fitting(read)
        candidates = self._generate(asked, seed)
        dropped: Counter[str] = Counter()
        rows = []
        for prompt, own in zip(prompts, candidates, strict=True):
            rejected = choose_rejected(
                prompt.answer, prompt.accepted, own, keep=self.settings.keep, dropped=dropped
            )
            if rejected is not None:
                rows.append(_orca_row(prompt, rejected))
        if not rows:
            raise UserError(
                f"pairs: none of {len(prompts)} prompts got a rejected answer "
                f"({dict(dropped)}); raise pairs.samples or pairs.temperature"
            )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write_text(self.folder / f"{name}.jsonl", lines)
        seconds = time.perf_counter() - began
        say(
            self.console,
            f"pairs: {len(rows)} {name} from {len(prompts)} prompts, passed over "
            + (", ".join(f"{n} {why}" for why, n in dropped.items()) or "none")
            + f", {seconds:.1f} s",
        )
        return {
            "prompts": len(prompts),
            "generated": sum(len(own) for own in candidates),
            "kept": len(rows),
            "dropped": dict(dropped),
            "seconds": seconds,
        }

    def _fitting(self, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[list[int]]]:
        """The prompts that leave room for an answer, and their tokens; the ledger has the others.

        Raises UserError when none is left.
        """
        template = resolve_template(self.tokenizer, None)
        context = context_length(self.model.config)
        kept, asked = [], []
        for prompt in prompts:
            ids = prompt_ids(self.tokenizer, template, prompt.turns)
            if context is not None and len(ids) + self.settings.max_new_tokens > context:
                detail = f"{len(ids)} tokens, of a context of {context}"
                self.ledger.dropped(prompt.origin, "no room for an answer of the model's", detail)
                continue
            kept.append(prompt)
            asked.append(ids)
        self.ledger.trained(len(kept))
        if len(kept) < len(prompts):
            say(
                self.console,
                f"pairs: {len(prompts) - len(kept)} of {len(prompts)} prompts leave no room for "
                f"{self.settings.max_new_tokens} tokens in the model's context of {context} (each "
                f"in {self.folder / 'data-ledger.jsonl'})",
            )
        if not kept:
            raise UserError(
                f"pairs: none of {len(prompts)} prompts can be asked; lower pairs.max_new_tokens "
                "or give shorter prompts"
            )
        return kept, asked

    def _generate(self, asked: Sequence[Sequence[int]], seed: int) -> list[list[Candidate]]:
        settings = self.settings
        template = resolve_template(self.tokenizer, None)
        with phase(self.console, "rejected answers", len(asked) * settings.samples) as advance:
            answers = generate_answers(
                self.model,
                [ids for ids in asked for _ in range(settings.samples)],
                stop_ids=stop_ids(self.tokenizer, template),
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=seed,
                advance=advance,
            )
        texts = self.tokenizer.batch_decode(
            [list(answer.ids) for answer in answers], skip_special_tokens=True
        )
        made = [Candidate(t, a.stopped) for t, a in zip(texts, answers, strict=True)]
        count = settings.samples
        return [made[i * count : (i + 1) * count] for i in range(len(asked))]


def _orca_row(prompt: Prompt, rejected: str) -> dict[str, str]:
    system = "".join(turn.content for turn in prompt.turns if turn.role == "system")
    question = prompt.turns[-1].content
    return {
        "system": system,
        "question": question,
        "chosen": prompt.answer,
        "rejected": rejected,
    }
