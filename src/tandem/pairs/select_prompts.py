"""Which prompts of an instruction set are asked: filters, then a seeded sample by strata."""

from __future__ import annotations

import heapq
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from rich.console import Console

from tandem.data.ledger import Entry, Ledger
from tandem.data.text.answers import refuses
from tandem.data.text.contamination import Other, fill
from tandem.data.text.language import language_of
from tandem.errors import UserError
from tandem.pairs.prompts import Prompt, read_prompts
from tandem.recipe.data_source import DataSource
from tandem.recipe.pairs_settings import PairsSettings
from tandem.runtime.console import log
from tandem.storage.hashing import hash_bytes

# Prompts that are looked for in evaluation sets together.
_AT_ONCE = 256


@dataclass(frozen=True)
class Selection:
    """What is asked for; None asks for nothing. Lengths are in characters.

    Attributes:
        count: so many prompts, all if there are fewer.
        stratify: sampled within each data set, or within each class of length.
        shares: of the strata: as in the data, or as equal as they allow.
        distinct: a prompt that occurred before is left out.
        min_prompt_characters, max_prompt_characters: of the user's text.
        min_answer_characters, max_answer_characters: of the set's answer.
        language: of prompt and answer; texts that do not say are kept.
        matches, excludes: regular expressions, searched in the user's text.
    """

    count: int | None = None
    stratify: Literal["source", "length"] | None = None
    shares: Literal["proportional", "equal"] = "proportional"
    distinct: bool = False
    min_prompt_characters: int | None = None
    max_prompt_characters: int | None = None
    min_answer_characters: int | None = None
    max_answer_characters: int | None = None
    language: str | None = None
    matches: str | None = None
    excludes: str | None = None


def select_prompts(
    prompts: Iterable[Prompt],
    selection: Selection,
    *,
    seed: int,
    evaluated: Other | None = None,
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts to ask, in reading order, and how many were left out, by reason.

    Prompts are streamed: at most `count` of each stratum are held.

    Args:
        prompts: in reading order.
        selection: what is asked for.
        seed: of the sample.
        evaluated: evaluation sets; prompts and answers that share words with them are left out.
    """
    left_out: Counter[str] = Counter()
    suited = _suited(prompts, selection, evaluated, left_out)
    if selection.count is None:
        return list(suited), dict(left_out)
    draw = random.Random(seed)
    held: dict[int, list[tuple[float, int, Prompt]]] = {}
    sizes: Counter[int] = Counter()
    for place, prompt in enumerate(suited):
        stratum = _stratum(prompt, selection.stratify)
        sizes[stratum] += 1
        heap = held.setdefault(stratum, [])
        # The smallest numbers are kept; a heap's first is its smallest, so their signs are turned.
        item = (-draw.random(), place, prompt)
        if len(heap) < selection.count:
            heapq.heappush(heap, item)
        else:
            heapq.heappushpop(heap, item)
    shares = _shares(sizes, selection.count, selection.shares)
    chosen = [
        (place, prompt)
        for stratum, heap in held.items()
        for _, place, prompt in sorted(heap, reverse=True, key=lambda i: i[:2])[: shares[stratum]]
    ]
    if unsampled := sizes.total() - len(chosen):
        left_out["not in the sample"] = unsampled
    return [prompt for _, prompt in sorted(chosen, key=lambda item: item[0])], dict(left_out)


def _suited(
    prompts: Iterable[Prompt],
    selection: Selection,
    evaluated: Other | None,
    left_out: Counter[str],
) -> Iterator[Prompt]:
    seen: set[str] = set()
    for prompt, of_itself in _one_by_one(prompts, selection, evaluated):
        reason = of_itself
        if reason is None and selection.distinct:
            key = hash_bytes(prompt.system.encode(), prompt.question.strip().encode())
            if key in seen:
                reason = "prompt occurred before"
            seen.add(key)
        if reason is None:
            yield prompt
        else:
            left_out[reason] += 1


def _one_by_one(
    prompts: Iterable[Prompt], selection: Selection, evaluated: Other | None
) -> Iterator[tuple[Prompt, str | None]]:
    """Each prompt, and why it is left out whatever the others are."""
    matches = re.compile(selection.matches) if selection.matches else None
    excludes = re.compile(selection.excludes) if selection.excludes else None
    left = iter(prompts)
    while some := list(islice(left, _AT_ONCE)):
        reasons = [_unsuited(prompt, selection, matches, excludes) for prompt in some]
        if evaluated is not None:
            texts = [text for p in some for text in (p.question, p.answer, p.system)]
            held = evaluated.held(texts).reshape(len(some), 3)
            reasons = [
                "in an evaluation set" if reason is None and own.any() else reason
                for reason, own in zip(reasons, held, strict=True)
            ]
        yield from zip(some, reasons, strict=True)


def _unsuited(
    prompt: Prompt,
    selection: Selection,
    matches: re.Pattern[str] | None,
    excludes: re.Pattern[str] | None,
) -> str | None:
    for what, text, least, most in (
        ("prompt", prompt.question, selection.min_prompt_characters,
         selection.max_prompt_characters),
        ("answer", prompt.answer, selection.min_answer_characters,
         selection.max_answer_characters),
    ):  # fmt: skip
        if least is not None and len(text) < least:
            return f"{what} too short"
        if most is not None and len(text) > most:
            return f"{what} too long"
    if matches is not None and not matches.search(prompt.question):
        return "prompt does not match"
    if excludes is not None and excludes.search(prompt.question):
        return "prompt is excluded"
    if selection.language is not None:
        for what, text in (("prompt", prompt.question), ("answer", prompt.answer)):
            if language_of(text) not in (None, selection.language):
                return f"{what} in another language"
    return None


def _stratum(prompt: Prompt, stratify: str | None) -> int:
    """Its data set, or the class of length that the prompt is in, each twice as wide."""
    if stratify == "source":
        return prompt.source
    return len(prompt.question).bit_length() if stratify == "length" else 0


def _shares(sizes: Counter[int], count: int, shares: str) -> dict[int, int]:
    """How many each stratum gives; together `count`, or all there are."""
    count = min(count, sizes.total())
    if shares == "equal":
        given = dict.fromkeys(sizes, 0)
        while count > 0:
            # In turns: who has nothing left gives no more.
            room = sorted(key for key in sizes if given[key] < sizes[key])
            each = max(1, count // len(room))
            for key in room[:count]:
                more = min(each, sizes[key] - given[key], count)
                given[key] += more
                count -= more
        return given
    exact = {key: size * count / sizes.total() for key, size in sizes.items()}
    given = {key: int(share) for key, share in exact.items()}
    # The largest remainders get what rounding down has left.
    remainders = sorted(exact, key=lambda key: (given[key] - exact[key], key))
    for key in remainders[: count - sum(given.values())]:
        given[key] += 1
    return given


def selected_prompts(
    sources: Sequence[DataSource],
    evaluated: Sequence[DataSource],
    settings: PairsSettings,
    seed: int,
    ledger: Ledger,
    console: Console,
) -> tuple[list[Prompt], dict[str, int]]:
    """As `asked_prompts`, and what is left out is said; raises UserError when nothing is left."""
    prompts, left_out = asked_prompts(
        sources, evaluated, settings, seed, ledger, log=lambda text: log(console, f"pairs: {text}")
    )
    _account("select", "prompts selected", prompts, ledger.entries, left_out, console)
    count = settings.select.count
    if count is not None and len(prompts) < count:
        log(
            console,
            f"pairs: pairs.select.count asks for {count} prompts, there are only {len(prompts)}",
        )
    return prompts, left_out


def heldout_prompts(
    sources: Sequence[DataSource], settings: PairsSettings, ledger: Ledger, console: Console
) -> list[Prompt]:
    """All `usable_prompts`, and the others are said; raises UserError when there is none."""
    before = len(ledger.entries)
    prompts = list(usable_prompts(sources, settings, ledger))
    _account("heldout", "held-out prompts", prompts, ledger.entries[before:], {}, console)
    return prompts


def asked_prompts(
    sources: Sequence[DataSource],
    evaluated: Sequence[DataSource],
    settings: PairsSettings,
    seed: int,
    ledger: Ledger,
    log: Callable[[str], None] = lambda _: None,
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts that `settings.select` asks for, and how many it left out, by reason.

    Args:
        sources: of prompts.
        evaluated: evaluation sets; prompts that share words with them are left out.
        settings: of the stage.
        seed: of the sample.
        ledger: gets the records that no selection could ask for.
        log: told when the evaluation sets are too large to be kept whole.

    Raises UserError for rows of evaluation sets that cannot be read, and as `usable_prompts`.
    """
    select = settings.select
    known = _set_of(evaluated, select.decontaminate_words) if evaluated else None
    if known is not None and known.sampled > 1:
        log(
            f"of the evaluation sets' runs of {select.decontaminate_words} words, one in "
            f"{known.sampled} is looked for; shorter overlaps may stay unseen"
        )
    return select_prompts(
        usable_prompts(sources, settings, ledger),
        Selection(**select.model_dump(exclude={"decontaminate", "decontaminate_words"})),
        seed=seed,
        evaluated=known,
    )


def usable_prompts(
    sources: Sequence[DataSource], settings: PairsSettings, ledger: Ledger
) -> Iterator[Prompt]:
    """The prompts that can be asked; records that cannot go to the ledger.

    Where the set's answers are chosen and refusals are to be dropped, that is no prompt whose
    answer is one: nothing is generated for it. Raises what `read_prompts` raises.
    """
    choosing = settings.rank is None and settings.filters.drop_refusals
    for prompt in read_prompts(sources, settings.keep, ledger, settings.on_bad_record):
        if choosing and refuses(prompt.answer):
            ledger.dropped(prompt.origin, "its own answer is a refusal")
        else:
            yield prompt


def _set_of(sources: Sequence[DataSource], run: int) -> Other:
    # What many questions share is no form here, but a passage that they are about.
    found = Other("evaluation sets", run=run, form=None)
    for source in sources:
        fill(found, source)
        if found.unreadable:
            raise UserError(f"{found.first_unreadable}: pairs.select.decontaminate needs every row")
    found.finish()
    return found


def _account(
    key: str,
    what: str,
    prompts: Sequence[Prompt],
    entries: Sequence[Entry],
    left_out: Mapping[str, int],
    console: Console,
) -> None:
    counts = Counter(entry.reason for entry in entries) + Counter(left_out)
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    if not prompts:
        raise UserError(
            f"pairs.{key}: no prompt is left ({reasons or 'the data has none'}); ask for less"
        )
    if reasons:
        log(console, f"pairs: {len(prompts)} {what}; left out: {reasons}")
