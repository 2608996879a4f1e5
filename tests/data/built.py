"""Datasets of a file or two, with everything that a test does not care about left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tandem.data.build_dataset import build_dataset
from tandem.data.encoded.dataset import EncodedDataset
from tandem.data.encoded.dataset_store import EncodedStore
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.encoded.worker_pool import EncodingWork, ShowProgress
from tandem.data.formats.format import Kind
from tandem.data.ledger import Ledger
from tandem.data.tokenize.chat_template import ChatTemplate, resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.truncation.limits import Limits
from tandem.recipe.data_source import DataSource


def prepare(
    kind: Kind,
    sources: Sequence[DataSource],
    *,
    tokenizer: Any,
    template: ChatTemplate,
    max_length: int,
    max_prompt_length: int | None = None,
    too_long: Any = "drop_old_turns",
    on_bad_record: Any = "stop",
    loss_on: Any = "answers",
    ledger: Ledger,
    store: EncodedStore | None = None,
    show: ShowProgress | None = None,
    workers: int | None = None,
    limit: int | None = None,
    rows: int | None = None,
) -> EncodedDataset:
    """The dataset that `build_dataset` makes of these."""
    chat = ChatTokenizer.of(tokenizer, template, rows)
    limits = Limits(max_length, max_prompt_length, too_long)
    options = EncodingOptions(kind, limits, on_bad_record, loss_on, loss_on == "text")
    return build_dataset(sources, chat, options, ledger, EncodingWork(store, workers, show, limit))


prepare_conversations = partial(prepare, "conversations")
prepare_pairs = partial(prepare, "preference pairs")


def made_of(
    tokenizer: Any,
    folder: Path,
    lines: list[Any],
    make: Any = prepare_conversations,
    **options: Any,
) -> tuple[Any, Ledger]:
    """The examples of some rows, and their ledger."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    ledger = Ledger(None)
    given: dict[str, Any] = {"template": resolve_template(tokenizer, "neural-chat")}
    given |= {"max_length": 512, "ledger": ledger, **options}
    return make([DataSource(path=str(file))], tokenizer=tokenizer, **given), ledger
