"""The records of a training stage: read, encoded and accounted for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tandem.data.ledger import Ledger
from tandem.data.sources import SourceSpec
from tandem.data.store import EncodedStore
from tandem.data.template import ChatTemplate
from tandem.data.trees import Trees
from tandem.recipe.schema import Training
from tandem.train.progress import phase, say


def prepared_records(
    prepare: Callable[..., Trees],
    sources: Sequence[SourceSpec],
    settings: Training,
    *,
    tokenizer: Any,
    template: ChatTemplate,
    folder: Path | None,
    name: str,
    console: Console,
) -> tuple[Ledger, Trees]:
    """A stage's records, and what became of each; the ledger is not written yet.

    Args:
        prepare: reads and encodes one kind of records, see `data.prepare`.
        sources: where they are.
        settings: of the stage.
        tokenizer, template: of the model.
        folder: the stage's, None where nothing is to be written.
        name: the stage's, before each line on the console.
        console: for progress and counts.

    Raises UserError for bad data, and when more records would be dropped than may be.
    """
    began = time.perf_counter()
    ledger = Ledger(None if folder is None else folder / "data-ledger.jsonl")
    trees = prepare(
        sources,
        tokenizer=tokenizer,
        template=template,
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
        on_bad_record=settings.on_bad_record,
        ledger=ledger,
        store=EncodedStore(lambda text: say(console, f"{name}: {text}")),
        show=lambda text, total: phase(console, f"{name}: {text}", total),
    )
    counts = ledger.summary()
    say(
        console,
        f"{name}: {counts['trained']} of {counts['read']} records to train on, "
        f"{counts['truncated']} truncated, {counts['dropped']} dropped"
        + (f" (each in {ledger.path})" if counts["reasons"] and ledger.path else "")
        + f", encoded in {time.perf_counter() - began:.1f} s",
    )
    for reason, count in counts["reasons"].items():
        say(console, f"  {count} x {reason}")
    ledger.check_share(settings.max_dropped)
    return ledger, trees
