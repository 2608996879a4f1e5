"""Which prompts the pairs stage asks, its evaluation sets taken into account."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tandem.data.chunks import BadLine
from tandem.data.formats.rows import texts_in
from tandem.data.ledger import Ledger
from tandem.data.sources import SourceSpec, read_rows
from tandem.errors import UserError
from tandem.pairs.filter import is_refusal
from tandem.pairs.prompts import Prompt, read_prompts
from tandem.pairs.select import Selection, select_prompts
from tandem.pairs.words import Contamination
from tandem.recipe.making_pairs import Pairs


def asked_prompts(
    sources: Sequence[SourceSpec],
    evaluated: Sequence[SourceSpec],
    settings: Pairs,
    seed: int,
    ledger: Ledger,
) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts that `settings.select` asks for, and how many it left out, by reason.

    Args:
        sources: of prompts.
        evaluated: evaluation sets; prompts with a part of one are left out.
        settings: of the stage.
        seed: of the sample.
        ledger: gets the records that no selection could ask for.

    Raises UserError for rows of evaluation sets that cannot be read, and as `usable_prompts`.
    """
    select = settings.select
    return select_prompts(
        usable_prompts(sources, settings, ledger),
        Selection(**select.model_dump(exclude={"decontaminate", "decontaminate_words"})),
        seed=seed,
        contamination=Contamination(_texts(evaluated), select.decontaminate_words)
        if evaluated
        else None,
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


def _texts(sources: Sequence[SourceSpec]) -> Iterator[str]:
    for source in sources:
        for row in read_rows(source):
            if isinstance(row, BadLine):
                raise UserError(f"{row.origin}: pairs.select.decontaminate: {row.reason}")
            yield from texts_in(row.fields)
