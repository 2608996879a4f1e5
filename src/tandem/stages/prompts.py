"""Which prompts the pairs stage asks, its evaluation sets taken into account."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tandem.data.ledger import Ledger
from tandem.data.overlap import Other, fill
from tandem.data.sources import SourceSpec
from tandem.errors import UserError
from tandem.pairs.filter import is_refusal
from tandem.pairs.prompts import Prompt, read_prompts
from tandem.pairs.select import Selection, select_prompts
from tandem.recipe.making_pairs import Pairs


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
        if choosing and is_refusal(prompt.answer):
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
