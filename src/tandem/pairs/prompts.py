"""Which prompts of an instruction set are asked: filters, then a seeded sample by strata."""

from __future__ import annotations

import heapq
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from tandem.data.ledger import Ledger
from tandem.data.read_records import read_conversations, read_questions
from tandem.data.records import Conversation, Origin, Turn
from tandem.data.sources.chunks import Row
from tandem.data.sources.rows import read_rows
from tandem.data.text.contamination import Other, fill
from tandem.data.text.text_traits import language_of, refuses
from tandem.errors import UserError
from tandem.recipe.choices import OnBadRecord
from tandem.recipe.data_source import DataSource
from tandem.recipe.pairs_settings import PairsSettings, SelectSettings
from tandem.storage.hashing import hash_bytes

# Prompts that are searched for in evaluation sets at once.
_AT_ONCE = 256

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question of an instruction set, with its answer."""

    turns: tuple[Turn, ...]  # a system turn, if there is one, and a user's
    answer: str  # the set's own
    accepted: tuple[str, ...]  # the texts that a right answer contains, if known
    origin: Origin
    source: int = 0  # counts the data sets

    @property
    def system(self) -> str:
        """The system turn's text, empty when there is none."""
        return "".join(turn.content for turn in self.turns if turn.role == "system")

    @property
    def question(self) -> str:
        """The user's text."""
        return self.turns[-1].content


def read_prompts(
    sources: Sequence[DataSource], keep: str, ledger: Ledger, on_bad_record: OnBadRecord = "stop"
) -> Iterator[Prompt]:
    """Prompts with their answers, from questions or from conversations' first exchanges.

    Conversations that cannot be used go to the ledger, and unparsable lines if they are dropped.
    Raises UserError for a bad question, and when keep is "wrong" and a source does not say what is
    right.
    """
    for number, source in enumerate(sources):
        first = next((row for row in read_rows(source) if isinstance(row, Row)), None)
        if first is not None and {"question", "answer"} <= first.fields.keys():
            for q in read_questions([source]):
                yield Prompt(q.turns, q.answer, q.accepted, q.origin, number)
            continue
        if keep == "wrong":
            raise UserError(
                f"{source.path}: pairs.keep is `wrong`, which needs rows of `question`, `answer` "
                "and `accepted`; use keep: different for conversations"
            )
        for conversation in read_conversations([source], ledger, on_bad_record):
            prompt = _first_exchange(conversation, number)
            if isinstance(prompt, str):
                ledger.dropped(conversation.origin, prompt)
            else:
                yield prompt


def _first_exchange(conversation: Conversation, source: int) -> Prompt | str:
    """The first question and its answer, or why a pair cannot be made of them."""
    turns = conversation.turns
    if conversation.tools or any(turn.calls or turn.role == "tool" for turn in turns):
        return "pairs are not made of exchanges with tools"
    if any(turn.reasoned for turn in turns):
        return "pairs are not made of answers with reasoning beside them"
    end = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
    asked = turns[:end]
    roles = [turn.role for turn in asked]
    if roles not in (["user"], ["system", "user"]):
        return "the first answer is not to one question"
    if not turns[end].content.strip():
        return "the first answer is empty"
    return Prompt(asked, turns[end].content, (), conversation.origin, source)


def select_prompts(
    prompts: Iterable[Prompt],
    selection: SelectSettings,
    *,
    seed: int,
    evaluated: Other | None = None,
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts to ask, in reading order, and how many were left out, by reason.

    Prompts are streamed: at most `count` of each stratum are in memory. Prompts and answers that
    share words with `evaluated` are left out.
    """
    left_out: Counter[str] = Counter()
    suited = _suited(prompts, selection, evaluated, left_out)
    if selection.count is None:
        return list(suited), dict(left_out)
    draw = random.Random(seed)
    heaps: dict[int, list[tuple[float, int, Prompt]]] = {}
    sizes: Counter[int] = Counter()
    for place, prompt in enumerate(suited):
        stratum = _stratum(prompt, selection.stratify)
        sizes[stratum] += 1
        heap = heaps.setdefault(stratum, [])
        # The smallest numbers are kept; a heap pops its smallest, so their signs are turned.
        item = (-draw.random(), place, prompt)
        if len(heap) < selection.count:
            heapq.heappush(heap, item)
        else:
            heapq.heappushpop(heap, item)
    shares = _shares(sizes, selection.count, selection.shares)
    chosen = [
        (place, prompt)
        for stratum, heap in heaps.items()
        for _, place, prompt in sorted(heap, reverse=True, key=lambda i: i[:2])[: shares[stratum]]
    ]
    if unsampled := sizes.total() - len(chosen):
        left_out["not in the sample"] = unsampled
    return [prompt for _, prompt in sorted(chosen, key=lambda item: item[0])], dict(left_out)


def _suited(
    prompts: Iterable[Prompt],
    selection: SelectSettings,
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
    prompts: Iterable[Prompt], selection: SelectSettings, evaluated: Other | None
) -> Iterator[tuple[Prompt, str | None]]:
    """Each prompt, and why it is left out, whatever the others are; None to keep it."""
    matches = re.compile(selection.matches) if selection.matches else None
    excludes = re.compile(selection.excludes) if selection.excludes else None
    left = iter(prompts)
    while some := list(islice(left, _AT_ONCE)):
        reasons = [_unsuited(prompt, selection, matches, excludes) for prompt in some]
        if evaluated is not None:
            texts = [text for p in some for text in (p.question, p.answer, p.system)]
            known = evaluated.held(texts).reshape(len(some), 3)
            reasons = [
                "in an evaluation set" if reason is None and own.any() else reason
                for reason, own in zip(reasons, known, strict=True)
            ]
        yield from zip(some, reasons, strict=True)


def _unsuited(
    prompt: Prompt,
    selection: SelectSettings,
    matches: re.Pattern[str] | None,
    excludes: re.Pattern[str] | None,
) -> str | None:
    for what, text in (("prompt", prompt.question), ("answer", prompt.answer)):
        least = getattr(selection, f"min_{what}_characters")
        most = getattr(selection, f"max_{what}_characters")
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
    """A prompt's data set, or its class of length, each twice as wide as the one before."""
    if stratify == "source":
        return prompt.source
    return len(prompt.question).bit_length() if stratify == "length" else 0


def _shares(sizes: Counter[int], count: int, shares: str) -> dict[int, int]:
    """How many each stratum gives; together `count`, or all there are."""
    count = min(count, sizes.total())
    if shares == "equal":
        parts = dict.fromkeys(sizes, 0)
        while count > 0:
            # In turns, among the strata that have prompts left.
            room = sorted(key for key in sizes if parts[key] < sizes[key])
            each = max(1, count // len(room))
            for key in room[:count]:
                more = min(each, sizes[key] - parts[key], count)
                parts[key] += more
                count -= more
        return parts
    exact = {key: size * count / sizes.total() for key, size in sizes.items()}
    parts = {key: int(share) for key, share in exact.items()}
    # The largest remainders get the rest.
    remainders = sorted(exact, key=lambda key: (parts[key] - exact[key], key))
    for key in remainders[: count - sum(parts.values())]:
        parts[key] += 1
    return parts


def selected_prompts(
    sources: Sequence[DataSource],
    evaluated: Sequence[DataSource],
    settings: PairsSettings,
    seed: int,
    ledger: Ledger,
    log: Log,
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts that `settings.select` asks for, and how many it left out, by reason.

    `evaluated` are evaluation sets; the ledger gets the records that no selection could ask for.
    Raises UserError for rows of evaluation sets that cannot be read, as `usable_prompts`, and when
    no prompt is left.
    """
    select = settings.select
    known = _set_of(evaluated, select.decontaminate_words) if evaluated else None
    if known is not None and known.sampled > 1:
        log(
            f"of the evaluation sets' runs of {select.decontaminate_words} words, one in "
            f"{known.sampled} is looked for; shorter overlaps may stay unseen"
        )
    usable = usable_prompts(sources, settings, ledger)
    prompts, left_out = select_prompts(usable, select, seed=seed, evaluated=known)
    counts = Counter(entry.reason for entry in ledger.entries) + Counter(left_out)
    _account("select", "prompts selected", prompts, counts, log)
    if select.count is not None and len(prompts) < select.count:
        log(f"pairs.select.count asks for {select.count} prompts, there are only {len(prompts)}")
    return prompts, left_out


def part_of(
    prompts: Sequence[Prompt], part: int, parts: int, seed: int
) -> tuple[list[Prompt], int]:
    """Return one of so many parts of some prompts, counted from 1, and how many are in the others.

    The parts are drawn with the seed, and differ in size by one text at most. Prompts of one text
    are in the same part, so that no part repeats another. Raises UserError for fewer texts than
    parts.
    """
    texts = [hash_bytes(prompt.system.encode(), prompt.question.encode()) for prompt in prompts]
    distinct = list(dict.fromkeys(texts))
    if len(distinct) < parts:
        raise UserError(
            f"pairs.parts: {len(distinct)} different prompts cannot be divided into {parts} parts; "
            "set fewer parts, or give more prompts"
        )
    random.Random(f"parts:{seed}").shuffle(distinct)
    own = set(distinct[part - 1 :: parts])
    kept = [prompt for prompt, text in zip(prompts, texts, strict=True) if text in own]
    return kept, len(prompts) - len(kept)


def heldout_prompts(
    sources: Sequence[DataSource], settings: PairsSettings, ledger: Ledger, log: Log
) -> list[Prompt]:
    """All `usable_prompts`; the number of others is logged. Raises UserError when there is none."""
    before = len(ledger.entries)
    prompts = list(usable_prompts(sources, settings, ledger))
    counts = Counter(entry.reason for entry in ledger.entries[before:])
    _account("heldout", "held-out prompts", prompts, counts, log)
    return prompts


def usable_prompts(
    sources: Sequence[DataSource], settings: PairsSettings, ledger: Ledger
) -> Iterator[Prompt]:
    """The prompts that can be asked; records that cannot go to the ledger.

    Where the set's answers are chosen and refusals are dropped, a prompt whose answer is a refusal
    goes there, too. Raises what `read_prompts` raises.
    """
    choosing = settings.rank is None and settings.filters.drop_refusals
    for prompt in read_prompts(sources, settings.keep, ledger, settings.on_bad_record):
        if choosing and refuses(prompt.answer):
            ledger.dropped(prompt.origin, "its own answer is a refusal")
        else:
            yield prompt


def _set_of(sources: Sequence[DataSource], run: int) -> Other:
    # Words that many questions share may be a passage that they are about, not a form to ignore.
    known = Other("evaluation sets", run=run, form=None)
    for source in sources:
        fill(known, source)
        if known.unreadable:
            raise UserError(f"{known.first_unreadable}: pairs.select.decontaminate needs every row")
    known.finish()
    return known


def _account(
    key: str, what: str, prompts: Sequence[Prompt], left_out: Mapping[str, int], log: Log
) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not prompts:
        raise UserError(
            f"pairs.{key}: no prompt is left ({reasons or 'the data has none'}); ask for less"
        )
    if reasons:
        log(f"{len(prompts)} {what}; left out: {reasons}")
