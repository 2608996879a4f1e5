"""Which prompts the pairs stage asks, its evaluation sets taken into account."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console

from tandem.data.answers import refuses
from tandem.data.ledger import Entry, Ledger
from tandem.data.overlap import Other, fill
from tandem.data.sources import SourceSpec
from tandem.errors import UserError
from tandem.pairs.prompts import Prompt, read_prompts
from tandem.pairs.select import Selection, select_prompts
from tandem.recipe.making_pairs import Pairs
from tandem.train.progress import say


def selected_prompts(
    sources: Sequence[SourceSpec],
    evaluated: Sequence[SourceSpec],
    settings: Pairs,
    seed: int,
    ledger: Ledger,
    console: Console,
) -> tuple[list[Prompt], dict[str, int]]:
    """As `asked_prompts`, and what is left out is said; raises UserError when nothing is left."""
    prompts, left_out = asked_prompts(
        sources, evaluated, settings, seed, ledger, tell=lambda text: say(console, f"pairs: {text}")
    )
    _account("select", "prompts selected", prompts, ledger.entries, left_out, console)
    count = settings.select.count
    if count is not None and len(prompts) < count:
        say(
            console,
            f"pairs: pairs.select.count asks for {count} prompts, there are only {len(prompts)}",
        )
    return prompts, left_out


def heldout_prompts(
    sources: Sequence[SourceSpec], settings: Pairs, ledger: Ledger, console: Console
) -> list[Prompt]:
    """All `usable_prompts`, and the others are said; raises UserError when there is none."""
    before = len(ledger.entries)
    prompts = list(usable_prompts(sources, settings, ledger))
    _account("heldout", "held-out prompts", prompts, ledger.entries[before:], {}, console)
    return prompts


def asked_prompts(
    sources: Sequence[SourceSpec],
    evaluated: Sequence[SourceSpec],
    settings: Pairs,
    seed: int,
    ledger: Ledger,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts that `settings.select` asks for, and how many it left out, by reason.

    Args:
        sources: of prompts.
        evaluated: evaluation sets; prompts that share words with them are left out.
        settings: of the stage.
        seed: of the sample.
        ledger: gets the records that no selection could ask for.
        tell: told when the evaluation sets are too large to be kept whole.

    Raises UserError for rows of evaluation sets that cannot be read, and as `usable_prompts`.
    """
    select = settings.select
    known = _set_of(evaluated, select.decontaminate_words) if evaluated else None
    if known is not None and known.sampled > 1:
        tell(
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
    sources: Sequence[SourceSpec], settings: Pairs, ledger: Ledger
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


def _set_of(sources: Sequence[SourceSpec], run: int) -> Other:
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
        say(console, f"pairs: {len(prompts)} {what}; left out: {reasons}")
