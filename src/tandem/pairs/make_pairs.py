"""Between the stages: preference pairs, with rejected answers written by the weaker model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.ledger import Ledger
from tandem.data.resolve_sources import data_identity, resolve_sources
from tandem.data.sources.rows import not_read
from tandem.errors import Stopped, UserError
from tandem.integrations.choose import device_names
from tandem.pairs.check_pairs import reach_again
from tandem.pairs.filters import (
    Candidate,
    Filters,
    Pair,
    UserCheck,
    against_answer,
    first_pair,
    ranked_pair,
)
from tandem.pairs.generators import GenerationJob, Generator, choose_generator
from tandem.pairs.pair_figures import length_figures, score_figures
from tandem.pairs.pairs_file import data_card, write_pairs
from tandem.pairs.prompts import Prompt, heldout_prompts, part_of, selected_prompts
from tandem.pairs.rankers import Ranker, choose_ranker
from tandem.recipe.data_source import DataSource
from tandem.recipe.jobs import PairsJob
from tandem.recipe.pairs_settings import PairsSettings
from tandem.recipe.run_settings import RunSettings
from tandem.runtime.console import log, phase, say_finished
from tandem.storage.atomic_files import atomic_write_json, atomic_write_text
from tandem.storage.folder_lock import folder_lock
from tandem.storage.hashing import hash_bytes, hash_json
from tandem.storage.journal import recorded
from tandem.storage.manifest import finish_stage, open_stage, start_stage, versions
from tandem.storage.run_folder import PAIRS_FORMATS, pairs_file, run_of

# Held-out prompts are sampled with seeds of their own.
_HELDOUT_SEED = 2**20
# So are those of each round: a model that has hardly moved would repeat itself.
_ROUND_SEED = 2**21
# Settings that may change on a resume: how a server is asked, not what.
_MANNERS = {"concurrency", "timeout", "retries", "requests_per_minute", "key_variable"}
_APART: Any = {
    "prompts": True,
    "heldout": True,
    "model": True,
    "select": {"decontaminate": True},
    "parts": True,
    "server": _MANNERS,
    "rank": {"reward_model": True, "judge": _MANNERS},
}


def make_pairs(job: PairsJob, console: Console) -> Path:
    """Write pairs and held-out pairs in the orca_dpo_pairs form; returns the folder.

    Finished answers are recorded in `generated/`, from which an interrupted stage resumes.
    `job.run.model` is the weaker model, asked in its own chat template unless a server writes.

    Raises UserError for prompts that cannot be used and when no pair is left, Stopped when a
    server no longer answers. A finished stage is found without torch.
    """
    run, settings, output_dir = job.run, job.settings, job.folder
    seed = run.seed
    generator = choose_generator(settings, run.model, run)
    ranker = choose_ranker(settings.rank, run) if settings.rank is not None else None
    generator.check()
    if ranker is not None:
        ranker.check()
    check = UserCheck(settings.filters.check) if settings.filters.check is not None else None
    sources = {
        name: resolve_sources(named, run_of(output_dir), seed)
        for name, named in (
            ("prompts", settings.prompts),
            ("heldout", settings.heldout),
            ("decontaminate", settings.select.decontaminate),
        )
    }
    inputs = {
        "model": generator.identity,
        **{name: data_identity(named) for name, named in sources.items()},
        "scorer": ranker.identity if ranker is not None else None,
        "computed": _computed(settings, run),
        "check": check.identity if check is not None else None,
        "settings": settings.model_dump(mode="json", exclude=_APART),
        "seed": seed,
        **_round_inputs(job),
    }
    with folder_lock(output_dir, lambda text: log(console, f"pairs: {text}")):
        opened = open_stage(output_dir, "pairs", inputs)
        if opened.state == "finished":
            say_finished(console, "pairs", output_dir)
            return output_dir
        import torch

        threads = opened.schedule.get("threads", torch.get_num_threads())
        start_stage(output_dir, "pairs", inputs, {"model": run.model, "threads": threads})
        for line in not_read([source for named in sources.values() for source in named]):
            log(console, f"pairs: {line}")
        with _threads(threads):
            if ranker is not None and opened.state == "fresh":
                reach_again(ranker, job.in_round)
            generator.open(console)
            if ranker is not None:
                ranker.open(console)
            filters = Filters(settings.filters, settings.keep, check)
            ledger = Ledger(output_dir / "data-ledger.jsonl")
            maker = PairMaker(
                generator, ranker, settings, filters, ledger, output_dir, job.in_round, console
            )
            outputs = maker.write(sources, inputs, seed)
        finish_stage(output_dir, outputs)
    return output_dir


def _round_inputs(job: PairsJob) -> dict[str, Any]:
    """What the pairs of a part, and of a later round, depend on besides."""
    parts, number = job.settings.parts, job.in_round
    return {
        **({"part": [number, parts]} if parts > 1 else {}),
        **({"round": number} if number > 1 else {}),
    }


def _computed(settings: PairsSettings, run: RunSettings) -> dict[str, str] | None:
    """The device and dtype of models in this process; None where servers do it all."""
    if settings.server is not None and (settings.rank is None or settings.rank.judge is not None):
        return None
    device = device_names(run)
    computed = {"dtype": device.dtype_name, "device": device.kind}
    # vLLM takes auto as the dtype of the model's files.
    return computed if settings.vllm is None else {**computed, "vllm_dtype": run.dtype}


@dataclass(frozen=True)
class PairMaker:
    """Who writes and ranks, and where the pairs go."""

    generator: Generator
    ranker: Ranker | None
    settings: PairsSettings
    filters: Filters
    ledger: Ledger
    folder: Path
    in_round: int
    console: Console

    def write(
        self, sources: dict[str, list[DataSource]], inputs: dict[str, Any], seed: int
    ) -> list[str]:
        """Write pairs, held-out pairs, ledger, summary and card; returns the files' names."""
        kind = self.settings.format
        for name in ("pairs", "heldout"):  # an earlier start may have had others
            for other in PAIRS_FORMATS:
                pairs_file(self.folder, name, other).unlink(missing_ok=True)
        prompts, left_out = selected_prompts(
            sources["prompts"], sources["decontaminate"], self.settings, seed, self.ledger, self.log
        )
        if self.settings.parts > 1:
            prompts, others = part_of(prompts, self.in_round, self.settings.parts, seed)
            left_out["in the part of another round"] = others
        drawn = seed + (self.in_round - 1) * _ROUND_SEED
        summary: dict[str, Any] = {} if self.in_round == 1 else {"round": self.in_round}
        summary |= self._make("pairs", prompts, drawn)
        summary["left_out"] = left_out
        outputs = [pairs_file(self.folder, "pairs", kind).name]
        if sources["heldout"]:
            heldout = heldout_prompts(sources["heldout"], self.settings, self.ledger, self.log)
            summary["heldout"] = self._make("heldout", heldout, seed + _HELDOUT_SEED)
            outputs.append(pairs_file(self.folder, "heldout", kind).name)
        self.ledger.write()
        summary["ledger"] = self.ledger.summary()
        summary["writer"] = self.generator.facts
        summary["scorer"] = self.ranker.facts if self.ranker is not None else None
        atomic_write_json(self.folder / "summary.json", summary)
        names = {name: [one.path for one in named] for name, named in sources.items() if named}
        card = data_card(
            summary=summary, sources=names, identities={name: inputs[name] for name in names},
            settings=self.settings.model_dump(mode="json", exclude={"prompts", "heldout"}),
            seed=drawn, versions=versions(), files=outputs,
        )  # fmt: skip
        atomic_write_text(self.folder / "README.md", card)
        return [*outputs, "summary.json", "README.md", "data-ledger.jsonl"]

    def log(self, text: str) -> None:
        """Put a line on the console, the stage's name before it."""
        log(self.console, f"pairs: {text}")

    def _make(self, name: str, prompts: Sequence[Prompt], seed: int) -> dict[str, Any]:
        """Write one file of pairs from some prompts; returns the counts for the summary."""
        began = time.perf_counter()
        job = self.generator.plan(prompts, seed, self.ledger)
        answers = self._answers(name, job)
        dropped: Counter[str] = Counter()
        figures: dict[str, Any] = {}
        if self.ranker is not None:
            results, figures["scores"] = self._ranked(self.ranker, name, job, answers, dropped)
        else:
            results = []
            for place, prompt in enumerate(job.prompts):
                own = [answers[n] for n in self._numbers(place) if n in answers]
                results.append(first_pair(prompt, own, self.filters, dropped))
        pairs = self._kept(job.prompts, results)
        if not pairs:
            raise self._without_pairs(len(job.prompts), dropped)
        write_pairs(pairs_file(self.folder, name, self.settings.format), pairs)
        seconds = time.perf_counter() - began
        failed = Counter(failure.reason for failure in self.generator.failed.values())
        self.log(
            f"{len(pairs)} {name} from {len(job.prompts)} prompts, passed over "
            + (", ".join(f"{n} {why}" for why, n in dropped.items()) or "none")
            + (f", unanswered {dict(failed)}" if failed else "")
            + f", {seconds:.1f} s",
        )
        return {
            "prompts": len(job.prompts),
            "generated": len(answers),
            "kept": len(pairs),
            "dropped": dict(dropped),
            "failed": dict(failed),
            "seconds": seconds,
            "characters": length_figures(answers.values(), pairs),
            **figures,
        }

    def _without_pairs(self, prompts: int, dropped: Counter[str]) -> UserError | Stopped:
        """What to say, and to do, where no prompt got a pair."""
        failed = {**self.generator.failed, **(self.ranker.failed if self.ranker else {})}
        passed_over = ", ".join(f"{count} {why}" for why, count in dropped.items()) or "no answers"
        text = f"pairs: none of {prompts} prompts got a pair ({passed_over})"
        if may_pass := [failure for failure in failed.values() if failure.may_pass]:
            return Stopped(
                f"{text}, and {len(may_pass)} requests are unanswered ({may_pass[0]}). What was "
                "generated is kept; the same command asks again."
            )
        ways = "raise pairs.samples or pairs.temperature, or filter less"
        if self.in_round > 1:
            ways += f"; rounds: {self.in_round - 1} ends the run with the model so far"
        return UserError(f"{text}; {ways}")

    def _kept(self, prompts: Sequence[Prompt], results: Sequence[Pair | str]) -> list[Pair]:
        failed = {**self.generator.failed, **(self.ranker.failed if self.ranker else {})}
        for place, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            if isinstance(result, str):
                why = dict.fromkeys(str(failed[n]) for n in self._numbers(place) if n in failed)
                self.ledger.dropped(prompt.origin, f"no pair: {result}", "; ".join(why))
        pairs = [result for result in results if isinstance(result, Pair)]
        self.ledger.trained(len(pairs))
        return pairs

    def _answers(self, name: str, job: GenerationJob) -> dict[int, Candidate]:
        """The answers by number, those of earlier starts included."""
        total = len(job.prompts) * self.settings.samples
        what = "answers" if self.ranker is not None else "rejected answers"
        path = self.folder / "generated" / f"{name}.jsonl"
        with phase(self.console, what, total) as advance:
            answers = recorded(path, job.key, job.write, self._counted(total, advance))
        return {number: Candidate(*value) for number, value in answers.items()}

    def _counted(self, total: int, advance: Callable[[int], None]) -> Callable[[int], None]:
        """Count what is done, and log how much earlier starts have recorded."""
        logged = False

        def count(more: int) -> None:
            nonlocal logged
            if not logged and more:
                self.log(f"resuming after {more} of {total} recorded")
            logged = True
            advance(more)

        return count

    def _ranked(
        self,
        ranker: Ranker,
        name: str,
        job: GenerationJob,
        answers: dict[int, Candidate],
        dropped: Counter[str],
    ) -> tuple[list[Pair | str], dict[str, float]]:
        """Pairs of each prompt's best and worst answer, and the `score_figures`."""
        assert self.settings.rank is not None
        margin = self.settings.rank.margin
        passing: dict[int, Candidate] = {}
        for number, candidate in sorted(answers.items()):
            reason = against_answer(candidate, self.filters.settings)
            if reason is None:
                passing[number] = candidate
            else:
                dropped[reason] += 1
        scores = self._scores(ranker, name, job, passing)
        dropped.update(f"not scored: {failure.reason}" for failure in ranker.failed.values())
        pairs: list[Pair | str] = []
        by_prompt = []
        for place, prompt in enumerate(job.prompts):
            scored = [(passing[n], scores[n]) for n in self._numbers(place) if n in scores]
            pairs.append(ranked_pair(prompt, scored, margin, self.filters, dropped))
            by_prompt.append(([score for _, score in scored], isinstance(pairs[-1], Pair)))
        return pairs, score_figures(by_prompt)

    def _scores(
        self, ranker: Ranker, name: str, job: GenerationJob, passing: dict[int, Candidate]
    ) -> dict[int, float]:
        """The scores of answers by number, those of earlier starts included."""
        texts = {number: one.text.strip() for number, one in passing.items()}
        # A server's answers may have been generated again, under the same numbers.
        digests = {number: hash_bytes(text.encode()) for number, text in texts.items()}

        def missing(done: Collection[int]) -> Iterator[Sequence[tuple[int, Any]]]:
            count, left = self.settings.samples, [n for n in texts if n not in done]
            for unit in ranker.scores([(n, job.prompts[n // count], texts[n]) for n in left]):
                yield [(number, [score, digests[number]]) for number, score in unit]

        def holds(number: int, value: Any) -> bool:
            return number in digests and value[1] == digests[number]

        key = hash_json([job.key, ranker.facts])
        path = self.folder / "generated" / f"{name}-scores.jsonl"
        with phase(self.console, "scores", len(texts)) as advance:
            scores = recorded(path, key, missing, self._counted(len(texts), advance), holds)
        return {number: score for number, (score, _) in scores.items()}

    def _numbers(self, place: int) -> range:
        """The numbers of a prompt's answers."""
        return range(place * self.settings.samples, (place + 1) * self.settings.samples)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with as many threads as the first start had: their number rounds sums."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
