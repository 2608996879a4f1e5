"""One measurement of encoding in its own process: `python -m benchmarks.encoding_side TASK`."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from .work import TEMPLATE

# The recipe's limits: max_length and max_prompt_length.
LIMITS = {"conversations": (2560, 1024), "pairs": (1536, 1024)}
_BATCH = 1000


def main() -> None:
    """Print what the task in the first argument measured, as JSON."""
    task = json.loads(sys.argv[1])
    sides = {"tandem": prepare, "bare": bare, "trl": trl}
    print(json.dumps(sides[task["side"]](task)))


def prepare(task: dict[str, Any]) -> dict[str, float]:
    """tandem's preparation as a training stage does it, its store in $XDG_CACHE_HOME."""
    from rich.console import Console

    import tandem.stages.sft  # noqa: F401  (a stage's process has torch in memory, too)
    from tandem.data.build_dataset import build_dataset
    from tandem.data.encoded.dataset_store import EncodedStore
    from tandem.data.encoded.encode_chunk import EncodingOptions
    from tandem.data.encoded.worker_pool import EncodingWork
    from tandem.data.formats.format import Kind
    from tandem.data.ledger import Ledger
    from tandem.data.tokenize.encode import ChatTokenizer
    from tandem.data.truncation.limits import Limits
    from tandem.recipe.data_source import DataSource
    from tandem.runtime.console import phase

    tokenizer, template = _tokenizer(task)
    console = Console(stderr=True)
    limits = LIMITS[task["kind"]]
    ledger = Ledger(None)
    began, used = time.perf_counter(), _core_seconds()
    kind: Kind = "preference pairs" if task["kind"] == "pairs" else "conversations"
    trees = build_dataset(
        [DataSource(path=task["data"])],
        ChatTokenizer.of(tokenizer, template),
        EncodingOptions(kind, Limits(*limits), "stop"),
        ledger,
        EncodingWork(
            store=EncodedStore(console.print),
            progress=lambda text, total: phase(console, text, total),
        ),
    )
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "core_seconds": _core_seconds() - used,
        "records": ledger.counts["read"],
        "tokens": int(trees.sequence_lengths.sum()),
    }


def bare(task: dict[str, Any]) -> dict[str, float]:
    """The tokenizer alone, on all cores: ids of the rendered sequences, and nothing else."""
    tokenizer, _ = _tokenizer(task)
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False)
        for record in _records(task)
        for messages in _sequences(record)
    ]
    backend, tokens = tokenizer.backend_tokenizer, 0
    began, used = time.perf_counter(), _core_seconds()
    for start in range(0, len(texts), _BATCH):
        encoded = backend.encode_batch(texts[start : start + _BATCH], add_special_tokens=False)
        tokens += sum(len(one) for one in encoded)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "core_seconds": _core_seconds() - used, "tokens": tokens}


def trl(task: dict[str, Any]) -> dict[str, float]:
    """What TRL's trainer does with the records before it trains: template, tokens, tables."""
    import datasets
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from .work import write_model

    tokenizer, _ = _tokenizer(task)
    records = list(_records(task))
    pairs = task["kind"] == "pairs"
    rows = [_pair_row(record) if pairs else {"messages": record} for record in records]
    table = datasets.Dataset.from_list(rows)
    limit = LIMITS[task["kind"]][0]
    with tempfile.TemporaryDirectory() as folder:
        write_model(1, Path(task["tokenizer"]), Path(folder) / "model")
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / "model")
        arguments = {
            "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none",
            "dataset_num_proc": task["cores"], "max_length": limit,
        }  # fmt: skip
        trainer, config = (DPOTrainer, DPOConfig) if pairs else (SFTTrainer, SFTConfig)
        began = time.perf_counter()
        trainer(
            model=model,
            args=config(**arguments),
            train_dataset=table,
            processing_class=tokenizer,
        )
        return {"seconds": time.perf_counter() - began, "records": len(rows)}


def _core_seconds() -> float:
    """Processor time of this process and of those it started and that have ended."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def _tokenizer(task: dict[str, Any]) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    from tandem.data.tokenize.chat_template import resolve_template

    tokenizer = AutoTokenizer.from_pretrained(task["tokenizer"], local_files_only=True)
    return tokenizer, resolve_template(tokenizer, TEMPLATE)


def _records(task: dict[str, Any]) -> list[Any]:
    """The first records: messages of a conversation, or the pair itself."""
    from tandem.data.ledger import Ledger
    from tandem.data.read_records import read_conversations, read_pairs
    from tandem.recipe.data_source import DataSource

    sources = [DataSource(path=task["data"])]
    if task["kind"] == "pairs":
        return list(islice(read_pairs(sources, Ledger(None)), task["sample"]))
    found = islice(read_conversations(sources, Ledger(None)), task["sample"])
    return [_messages(conversation.turns) for conversation in found]


def _messages(turns: Any) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _sequences(record: Any) -> list[list[dict[str, str]]]:
    if isinstance(record, list):
        return [record]
    row = _pair_row(record)
    return [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]


def _pair_row(pair: Any) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": _messages(pair.prompt),
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


if __name__ == "__main__":
    main()
