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
from tandem.data.ledger import Ledger
from tandem.data.prepare import read_conversations, read_questions
from tandem.data.records import Turn
from tandem.data.sources import Row, SourceSpec, read_rows
from tandem.data.template import prompt_ids, resolve_template, stop_ids
from tandem.errors import UserError
from tandem.model.generate import generate_answers
from tandem.model.load import load_model, load_tokenizer, model_folder
from tandem.pairs.filter import Candidate, choose_rejected
from tandem.recipe.schema import Pairs
from tandem.stages.sources import data_identity, source_specs
from tandem.train.device import Runtime, choose_device
from tandem.train.progress import phase, say


@dataclass(frozen=True)
class Prompt:
    """What is asked, the set's own answer, and the texts a right answer contains, if known."""

    turns: tuple[Turn, ...]
    answer: str
    accepted: tuple[str, ...]


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
        device = choose_device(runtime.device, runtime.dtype)
        tokenizer = load_tokenizer(folder)
        loaded = load_model(folder, dtype=device.weights, device=device.torch_device)
        summary: dict[str, Any] = {}
        outputs = []
        for name, specs, offset in (("pairs", sources, 0), ("heldout", heldout, 1)):
            if not specs:
                # An earlier start may have had some.
                (output_dir / f"{name}.jsonl").unlink(missing_ok=True)
                continue
            prompts = read_prompts(specs, settings.keep)
            rows, counts = _make(
                loaded, tokenizer, prompts, settings, seed + offset * 2**20, console
            )
            if not rows:
                raise UserError(
                    f"pairs: none of {len(prompts)} prompts got a rejected answer "
                    f"({counts['dropped']}); raise pairs.samples or pairs.temperature"
                )
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            atomic_write_text(output_dir / f"{name}.jsonl", lines)
            outputs.append(f"{name}.jsonl")
            summary[name] = counts
            say(
                console,
                f"pairs: {counts['kept']} {name} from {counts['prompts']} prompts, passed over "
                + (", ".join(f"{n} {why}" for why, n in counts["dropped"].items()) or "none")
                + f", {counts['seconds']:.1f} s",
            )
        atomic_write_json(output_dir / "summary.json", {**summary.pop("pairs"), **summary})
        finish_stage(output_dir, [*outputs, "summary.json"])
    return output_dir


def read_prompts(sources: Sequence[SourceSpec], keep: str) -> list[Prompt]:
    """Prompts with their answers, from questions or from conversations' first exchanges.

    Raises UserError when keep is "wrong" and a source does not say what is right.
    """
    prompts: list[Prompt] = []
    for source in sources:
        first = next((row for row in read_rows(source) if isinstance(row, Row)), None)
        if first is not None and {"question", "answer"} <= first.fields.keys():
            questions = read_questions([source])
            prompts += [Prompt(q.turns, q.answer, q.accepted) for q in questions]
            continue
        if keep == "wrong":
            raise UserError(
                f"{source.path}: pairs.keep is `wrong`, which needs rows of `question`, `answer` "
                "and `accepted`; use keep: different for conversations"
            )
        for conversation in read_conversations([source], Ledger(None)):
            turns = conversation.turns
            end = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
            prompts.append(Prompt(turns[:end], turns[end].content, ()))
    return prompts


def _make(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    settings: Pairs,
    seed: int,
    console: Console,
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    began = time.perf_counter()
    template = resolve_template(tokenizer, None)
    asked = [prompt_ids(tokenizer, template, prompt.turns) for prompt in prompts]
    with phase(console, "rejected answers", len(prompts) * settings.samples) as advance:
        answers = generate_answers(
            model,
            [ids for ids in asked for _ in range(settings.samples)],
            stop_ids=stop_ids(tokenizer, template),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=seed,
            advance=advance,
        )
    texts = tokenizer.batch_decode([list(a.ids) for a in answers], skip_special_tokens=True)
    candidates = [Candidate(t, a.stopped) for t, a in zip(texts, answers, strict=True)]
    dropped: Counter[str] = Counter()
    rows = []
    for number, prompt in enumerate(prompts):
        own = candidates[number * settings.samples : (number + 1) * settings.samples]
        rejected = choose_rejected(
            prompt.answer, prompt.accepted, own, keep=settings.keep, dropped=dropped
        )
        if rejected is not None:
            rows.append(_orca_row(prompt, rejected))
    counts = {
        "prompts": len(prompts),
        "generated": len(answers),
        "kept": len(rows),
        "dropped": dict(dropped),
        "seconds": time.perf_counter() - began,
    }
    return rows, counts


def _orca_row(prompt: Prompt, rejected: str) -> dict[str, str]:
    system = "".join(turn.content for turn in prompt.turns if turn.role == "system")
    question = prompt.turns[-1].content
    return {
        "system": system,
        "question": question,
        "chosen": prompt.answer,
        "rejected": rejected,
    }
