"""Between the stages: preference pairs, with rejected answers written by the weaker model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tandem.data.ledger import Ledger
from tandem.data.resolve_sources import data_identity, resolve_sources
from tandem.data.sources.rows import not_read
from tandem.errors import UserError
from tandem.pairs.filters import (
    Candidate,
    Check,
    Filters,
    Pair,
    against_answer,
    first_pair,
    ranked_pair,
)
from tandem.pairs.generators import Work, Writer, check_writers, open_writer, writer_identity
from tandem.pairs.pairs_file import data_card, pairs_file, write_pairs
from tandem.pairs.prompts import Prompt
from tandem.pairs.rankers import Scorer, open_scorer, scorer_identity
from tandem.pairs.select_prompts import heldout_prompts, selected_prompts
from tandem.recipe.data_source import DataSource
from tandem.recipe.pairs_settings import PairsSettings
from tandem.recipe.run_settings import Runtime
from tandem.runtime.console import log, phase
from tandem.runtime.device import choose_device
from tandem.storage.atomic_files import atomic_write_json, atomic_write_text
from tandem.storage.folder_lock import folder_lock
from tandem.storage.hashing import hash_bytes, hash_json
from tandem.storage.journal import recorded
from tandem.storage.manifest import finish_stage, open_stage, start_stage, versions

# Held-out prompts are sampled with seeds of their own.
_HELDOUT_SEED = 2**20
# What may change between two starts: it says how a server is asked, not what.
_MANNERS = {"concurrency", "timeout", "retries", "requests_per_minute", "key_variable"}
_APART: Any = {
    "prompts": True,
    "heldout": True,
    "model": True,
    "select": {"decontaminate": True},
    "server": _MANNERS,
    "rank": {"reward_model": True, "judge": _MANNERS},
}


def run_pairs(
    *,
    model: str,
    settings: PairsSettings,
    output_dir: Path,
    seed: int,
    runtime: Runtime,
    console: Console,
) -> Path:
    """Write pairs and held-out pairs in the orca_dpo_pairs form; returns the folder.

    Answers are recorded as they are finished, in `generated/`: an interrupted stage goes on after
    them.

    Args:
        model: the weaker model, asked in its own chat template; not read where a server writes.
        settings: prompts, sampling and filters.
        output_dir: the stage's folder.
        seed: of the selection and the sampling.
        runtime: device and dtype.
        console: for progress.

    Raises UserError for prompts that cannot be used and when no pair is left, Stopped when a
    server no longer answers.
    """
    check_writers(settings)
    check = Check(settings.filters.check) if settings.filters.check is not None else None
    specs = {
        name: resolve_sources(sources, output_dir.parent, seed)
        for name, sources in (
            ("prompts", settings.prompts),
            ("heldout", settings.heldout),
            ("decontaminate", settings.select.decontaminate),
        )
    }
    inputs = {
        "model": writer_identity(settings, model),
        **{name: data_identity(found) for name, found in specs.items()},
        "scorer": scorer_identity(settings.rank) if settings.rank is not None else None,
        "computed": _computed(settings, runtime),
        "check": check.identity if check is not None else None,
        "settings": settings.model_dump(mode="json", exclude=_APART),
        "seed": seed,
    }
    with folder_lock(output_dir, lambda text: log(console, f"pairs: {text}")):
        opened = open_stage(output_dir, "pairs", inputs)
        if opened.state == "finished":
            log(console, f"pairs: {output_dir} is finished with these inputs; nothing to do")
            return output_dir
        threads = opened.schedule.get("threads", torch.get_num_threads())
        start_stage(output_dir, "pairs", inputs, {"model": model, "threads": threads})
        for line in not_read([spec for named in specs.values() for spec in named]):
            log(console, f"pairs: {line}")
        with _threads(threads):
            maker = _Maker(
                open_writer(settings, model, runtime, console),
                open_scorer(settings.rank, runtime, console) if settings.rank else None,
                settings,
                Filters(
                    keep=settings.keep,
                    check=check,
                    **settings.filters.model_dump(exclude={"check"}),
                ),
                Ledger(output_dir / "data-ledger.jsonl"),
                output_dir,
                console,
            )
            outputs = maker.everything(specs, inputs, seed)
        finish_stage(output_dir, outputs)
    return output_dir


def _computed(settings: PairsSettings, runtime: Runtime) -> dict[str, str] | None:
    """What a model in this process computes with; None where servers do it all."""
    if settings.server is not None and (settings.rank is None or settings.rank.judge is not None):
        return None
    device = choose_device(runtime.device, runtime.dtype, runtime.hpu)
    found = {"dtype": device.dtype_name, "device": device.kind}
    # To vLLM, auto is the dtype that the model's files say.
    return found if settings.vllm is None else {**found, "vllm_dtype": runtime.dtype}


@dataclass(frozen=True)
class _Maker:
    """Who writes and ranks, and where the pairs go."""

    writer: Writer
    scorer: Scorer | None
    settings: PairsSettings
    filters: Filters
    ledger: Ledger
    folder: Path
    console: Console

    def everything(
        self, specs: dict[str, list[DataSource]], inputs: dict[str, Any], seed: int
    ) -> list[str]:
        """Pairs, held-out pairs, ledger, summary and card; returns the files' names."""
        kind = self.settings.format
        for name in ("pairs", "heldout"):  # an earlier start may have had others
            for other in ("jsonl", "parquet"):
                pairs_file(self.folder, name, other).unlink(missing_ok=True)
        prompts, left_out = selected_prompts(
            specs["prompts"], specs["decontaminate"], self.settings, seed, self.ledger, self.console
        )
        summary = self._make("pairs", prompts, seed)
        summary["left_out"] = left_out
        outputs = [pairs_file(self.folder, "pairs", kind).name]
        if specs["heldout"]:
            heldout = heldout_prompts(specs["heldout"], self.settings, self.ledger, self.console)
            summary["heldout"] = self._make("heldout", heldout, seed + _HELDOUT_SEED)
            outputs.append(pairs_file(self.folder, "heldout", kind).name)
        self.ledger.write()
        summary["ledger"] = self.ledger.summary()
        summary["writer"] = self.writer.facts
        summary["scorer"] = self.scorer.facts if self.scorer is not None else None
        atomic_write_json(self.folder / "summary.json", summary)
        names = {name: [source.path for source in found] for name, found in specs.items() if found}
        card = data_card(
            summary=summary,
            sources=names,
            identities={name: inputs[name] for name in names},
            settings=self.settings.model_dump(mode="json", exclude={"prompts", "heldout"}),
            seed=seed,
            versions=versions(),
            files=outputs,
        )
        atomic_write_text(self.folder / "README.md", card)
        return [*outputs, "summary.json", "README.md", "data-ledger.jsonl"]

    def _make(self, name: str, read: Sequence[Prompt], seed: int) -> dict[str, Any]:
        """Write one file of pairs from some prompts; returns the counts for the summary."""
        began = time.perf_counter()
        work = self.writer.plan(read, seed, self.ledger)
        answers = self._answers(name, work)
        dropped: Counter[str] = Counter()
        if self.scorer is not None and self.settings.rank is not None:
            margin = self.settings.rank.margin
            found = self._ranked(self.scorer, margin, name, work, answers, dropped)
        else:
            samples = self.settings.samples
            found = [
                first_pair(
                    prompt,
                    [answers[n] for n in _numbers(i, samples) if n in answers],
                    self.filters,
                    dropped,
                )
                for i, prompt in enumerate(work.prompts)
            ]
        pairs = self._kept(work.prompts, found)
        if not pairs:
            raise UserError(
                f"pairs: none of {len(work.prompts)} prompts got a rejected answer "
                f"({dict(dropped)}); raise pairs.samples or pairs.temperature, or filter less"
            )
        write_pairs(pairs_file(self.folder, name, self.settings.format), pairs)
        seconds = time.perf_counter() - began
        failed = Counter(failure.reason for failure in self.writer.failed.values())
        log(
            self.console,
            f"pairs: {len(pairs)} {name} from {len(work.prompts)} prompts, passed over "
            + (", ".join(f"{n} {why}" for why, n in dropped.items()) or "none")
            + (f", unanswered {dict(failed)}" if failed else "")
            + f", {seconds:.1f} s",
        )
        return {
            "prompts": len(work.prompts),
            "generated": len(answers),
            "kept": len(pairs),
            "dropped": dict(dropped),
            "failed": dict(failed),
            "seconds": seconds,
        }

    def _kept(self, prompts: Sequence[Prompt], found: Sequence[Pair | str]) -> list[Pair]:
        failed = {**self.writer.failed, **(self.scorer.failed if self.scorer else {})}
        pairs = []
        for i, (prompt, pair) in enumerate(zip(prompts, found, strict=True)):
            if isinstance(pair, Pair):
                pairs.append(pair)
                continue
            numbers = _numbers(i, self.settings.samples)
            why = dict.fromkeys(str(failed[n]) for n in numbers if n in failed)
            self.ledger.dropped(prompt.origin, f"no pair: {pair}", "; ".join(why))
        self.ledger.trained(len(pairs))
        return pairs

    def _answers(self, name: str, work: Work) -> dict[int, Candidate]:
        """The answers by number, those of earlier starts included."""
        total = len(work.prompts) * self.settings.samples
        what = "answers" if self.scorer is not None else "rejected answers"
        path = self.folder / "generated" / f"{name}.jsonl"
        with phase(self.console, what, total) as advance:
            found = recorded(path, work.key, work.write, self._counted(total, advance))
        return {number: Candidate(*value) for number, value in found.items()}

    def _counted(self, total: int, advance: Callable[[int], None]) -> Callable[[int], None]:
        """Tells how many there are, and says how many earlier starts have left."""
        told = False

        def count(more: int) -> None:
            nonlocal told
            if not told and more:
                log(self.console, f"pairs: going on after {more} of {total} recorded")
            told = True
            advance(more)

        return count

    def _ranked(
        self,
        scorer: Scorer,
        margin: float,
        name: str,
        work: Work,
        answers: dict[int, Candidate],
        dropped: Counter[str],
    ) -> list[Pair | str]:
        """Pairs of each prompt's best and worst answer."""
        samples = self.settings.samples
        passing: dict[int, Candidate] = {}
        for number, candidate in sorted(answers.items()):
            reason = against_answer(candidate, self.filters)
            if reason is None:
                passing[number] = candidate
            else:
                dropped[reason] += 1

        scores = self._scores(scorer, name, work, passing)
        dropped.update(f"not scored: {failure.reason}" for failure in scorer.failed.values())
        return [
            ranked_pair(
                prompt,
                [
                    (passing[n], scores[n])
                    for n in _numbers(i, samples)
                    if n in passing and n in scores
                ],
                margin,
                self.filters,
                dropped,
            )
            for i, prompt in enumerate(work.prompts)
        ]

    def _scores(
        self, scorer: Scorer, name: str, work: Work, passing: dict[int, Candidate]
    ) -> dict[int, float]:
        """The scores of answers by number, those of earlier starts included."""
        texts = {number: one.text.strip() for number, one in passing.items()}
        # A server's answers may have been generated anew, under the same numbers.
        digests = {number: hash_bytes(text.encode()) for number, text in texts.items()}

        def missing(done: Collection[int]) -> Iterator[Sequence[tuple[int, Any]]]:
            asked = [
                (number, work.prompts[number // self.settings.samples], text)
                for number, text in texts.items()
                if number not in done
            ]
            for unit in scorer.scores(asked):
                yield [(number, [score, digests[number]]) for number, score in unit]

        def holds(number: int, value: Any) -> bool:
            return number in digests and value[1] == digests[number]

        key = hash_json([work.key, scorer.facts])
        path = self.folder / "generated" / f"{name}-scores.jsonl"
        with phase(self.console, "scores", len(texts)) as advance:
            found = recorded(path, key, missing, self._counted(len(texts), advance), holds)
        return {number: score for number, (score, _) in found.items()}


def _numbers(place: int, samples: int) -> range:
    """The numbers of a prompt's answers."""
    return range(place * samples, (place + 1) * samples)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as the first start had, for sums are rounded as they are shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
