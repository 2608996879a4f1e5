"""Worker processes: what they give is what one process gives, errors and order included."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tandem.data.encoded import encode_chunk, worker_pool
from tandem.data.encoded.dataset_store import EncodedStore
from tandem.data.encoded.worker_pool import EncodingSetup
from tandem.data.ledger import Ledger
from tandem.data.sources import file_chunks as files
from tandem.data.sources.chunks import LineChunk
from tandem.data.sources.file_chunks import file_chunks
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.truncation.limits import Limits
from tandem.errors import TandemError, UserError
from tandem.recipe.data_source import DataSource

from .built import prepare_conversations, prepare_pairs
from .test_prepare import pair, talk, write

NEW = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}


@pytest.fixture
def started() -> Callable[[], list[psutil.Process]]:
    """This process's children that were started since; tests may share a server of processes."""
    before = set(psutil.Process().children())
    return lambda: [one for one in psutil.Process().children() if one not in before]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_ROWS", 16)
    monkeypatch.setattr(worker_pool, "_FEW", 2)


def both_ways(
    sources: list[DataSource], tokenizer: Any, kind: Any, folder: Path, **options: Any
) -> None:
    """Prepare with one process and with two; everything written must be the same bytes."""
    template = resolve_template(tokenizer, "neural-chat")
    results = []
    for workers in (1, 2):
        store, ledger = EncodedStore(print, folder / str(workers)), Ledger(None)
        trees = kind(
            sources,
            tokenizer=tokenizer,
            template=template,
            ledger=ledger,
            store=store,
            workers=workers,
            **options,
        )
        (entry,) = store.folder.iterdir()
        files = {file.name: file.read_bytes() for file in entry.iterdir()}
        results.append((entry.name, files, ledger.entries, ledger.formats, ledger.counts))
        assert len(trees) == ledger.counts["trained"] > 0
    assert results[0] == results[1]


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet", "json", "csv"])
def test_two_processes_write_what_one_writes(
    shared_data: Path, stories_tokenizer: Any, tmp_path: Path, suffix: str
) -> None:
    lines = (shared_data / "pairs" / "mixed_pairs.jsonl").read_text().rstrip("\n").split("\n")
    rows = [json.loads(line) for line in lines[:40]]
    rows[27] = pair("Q", "A", "A")
    file = tmp_path / f"p.{suffix}"
    if suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=14)
    elif suffix == "json":
        file.write_text(json.dumps(rows))
    elif suffix == "jsonl.gz":
        file.write_bytes(gzip.compress("\n\n".join(map(json.dumps, rows)).encode()))
    elif suffix == "csv":
        with file.open("w", newline="") as cells:
            table = csv.DictWriter(cells, list(rows[0]), extrasaction="ignore")
            table.writeheader()
            table.writerows(rows)
    else:
        file.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)))
    with (shared_data / "pairs" / "orca_dpo_pairs.jsonl").open() as others:
        (tmp_path / "orca.jsonl").write_text("".join(itertools.islice(others, 18)))
    sources = [DataSource(path=str(file)), DataSource(path=str(tmp_path / "orca.jsonl"))]
    both_ways(sources, stories_tokenizer, prepare_pairs, tmp_path / "s", max_length=256)


def test_renamed_and_joined_rows_too(
    shared_data: Path, stories_tokenizer: Any, tmp_path: Path
) -> None:
    lines = (shared_data / "pairs" / "orca_dpo_pairs.jsonl").read_text().split("\n")[:30]
    rows = [json.loads(line) for line in lines]
    labelled = [
        {"ask": row["question"], "completion": row[key], "label": key == "chosen"}
        for key in ("chosen", "rejected")
        for row in rows
    ]
    source = write(tmp_path / "p.jsonl", [*labelled[:35], {"text": "?"}, *labelled[35:]])
    both_ways(
        [DataSource(path=source.path, fields={"prompt": "ask"})], stories_tokenizer, prepare_pairs,
        tmp_path / "s", max_length=256,
    )  # fmt: skip


def test_conversations_too(shared_data: Path, byte_tokenizer: Any, tmp_path: Path) -> None:
    lines = (shared_data / "conversations" / "slimorca_format.jsonl").read_text().split("\n")
    chosen = random.Random(0).sample(lines, 40)
    chosen[20] = "{not json"
    source = write(tmp_path / "c.jsonl", chosen)
    both_ways(
        [source], byte_tokenizer, prepare_conversations, tmp_path / "s",
        max_length=512, on_bad_record="drop",
    )  # fmt: skip


def test_the_first_error_in_reading_order_is_raised(
    stories_tokenizer: Any, tmp_path: Path, started: Callable[[], list[psutil.Process]]
) -> None:
    good = [pair(f"What is {n}?", "It.", "Not.") for n in range(200)]
    broken = write(tmp_path / "p.jsonl", [*good[:150], "{", *good, "["])
    wrong = write(tmp_path / "c.jsonl", [talk("Hi", "Hello")])
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"p\.jsonl, row 151: the record is not valid JSON"):
            prepare_pairs(
                [broken, wrong],
                tokenizer=stories_tokenizer,
                template=resolve_template(stories_tokenizer, "neural-chat"),
                max_length=512,
                ledger=Ledger(None),
                workers=workers,
            )
    assert not started()


def test_a_wrong_second_source_is_raised_after_the_first_is_done(
    stories_tokenizer: Any, tmp_path: Path
) -> None:
    good = write(tmp_path / "p.jsonl", [pair(f"{n}?", "It.", "Not.") for n in range(100)])
    wrong = write(tmp_path / "c.jsonl", [talk("Hi", "Hello")])
    with pytest.raises(UserError, match=r"c\.jsonl holds conversations"):
        prepare_pairs(
            [good, wrong],
            tokenizer=stories_tokenizer,
            template=resolve_template(stories_tokenizer, "neural-chat"),
            max_length=512,
            ledger=Ledger(None),
            workers=2,
        )


def test_progress_is_shown_for_large_data_alone(stories_tokenizer: Any, tmp_path: Path) -> None:
    shown: list[Any] = []

    @contextmanager
    def show(text: str, total: int | None) -> Any:
        shown.append((text, total))
        yield shown.append

    def run(count: int, workers: int) -> None:
        source = write(tmp_path / "p.jsonl", [pair(f"{n}?", "It.", "No.") for n in range(count)])
        prepare_pairs(
            [source],
            tokenizer=stories_tokenizer,
            template=resolve_template(stories_tokenizer, "neural-chat"),
            max_length=512,
            ledger=Ledger(None),
            workers=workers,
            show=show,
        )

    run(32, 2)
    assert shown == []
    for workers in (1, 2):
        shown.clear()
        run(50, workers)
        assert shown == [("encoding records", 50), 16, 16, 16, 2]


def setup_of(tokenizer: Any) -> EncodingSetup:
    chat = ChatTokenizer.of(tokenizer, resolve_template(tokenizer, "neural-chat"))
    assert chat.parts is not None
    return EncodingSetup(
        chat.parts, encode_chunk.EncodingOptions("preference pairs", Limits(512, None), "stop")
    )


def test_a_worker_that_dies_is_an_error_not_a_wait(
    stories_tokenizer: Any, tmp_path: Path, started: Callable[[], list[psutil.Process]]
) -> None:
    source = write(tmp_path / "p.jsonl", [pair(f"{n}?", "It.", "No.") for n in range(64)])
    tasks = [(chunk, "orca_dpo_pairs") for chunk in file_chunks(Path(source.path))]
    with worker_pool.Pool(setup_of(stories_tokenizer), 1) as workers:
        results = workers.map(tasks)
        next(results)
        started()[0].kill()
        with pytest.raises(TandemError, match="ended by itself"):
            list(results)


def test_a_bug_in_a_worker_is_told_with_its_trace(stories_tokenizer: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", [pair("Q?", "It.", "No.")])
    (chunk,) = file_chunks(Path(source.path))
    with (
        worker_pool.Pool(setup_of(stories_tokenizer), 1) as workers,
        pytest.raises(RuntimeError, match="KeyError"),
    ):
        list(workers.map([(chunk, "no such format")]))


def test_a_file_that_vanishes_is_the_users_to_hear_of(
    stories_tokenizer: Any, tmp_path: Path
) -> None:
    chunk = LineChunk(str(tmp_path / "gone.jsonl"), 1, 1, 0, 10)
    with (
        worker_pool.Pool(setup_of(stories_tokenizer), 1) as workers,
        pytest.raises(UserError, match=r"gone\.jsonl cannot be read"),
    ):
        list(workers.map([(chunk, "orca_dpo_pairs")]))


def test_workers_do_without_torch_transformers_and_pydantic() -> None:
    code = (
        "import sys, tandem.data.encoded.worker_pool, jinja2, tokenizers;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=NEW).returncode == 0
    assert worker_pool.main.__module__ == "tandem.data.encoded.worker_pool"


_LONG = """
import signal, sys
# A shell starts what runs in the background deaf to interrupts, and so is all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from tandem.data.build_dataset import build_dataset
from tandem.data.encoded import worker_pool
from tandem.data.encoded.encode_chunk import EncodingOptions
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.tokenize.light_tokenizer import read_light_tokenizer
from tandem.data.truncation.limits import Limits
from tandem.data.ledger import Ledger
from tandem.recipe.data_source import DataSource
from tandem.data.encoded.dataset_store import EncodedStore
from tandem.data.tokenize.chat_template import resolve_template
from tandem.data.sources import file_chunks
file_chunks._ROWS, worker_pool._FEW = 16, 2
tokenizer = read_light_tokenizer(Path(sys.argv[1]))
def show(text, total):
    print("started", flush=True)
    from contextlib import nullcontext
    return nullcontext(lambda n: print("done", flush=True))
build_dataset(
    [DataSource(path=sys.argv[2])],
    ChatTokenizer.of(tokenizer, resolve_template(tokenizer, "neural-chat")),
    EncodingOptions("preference pairs", Limits(512, None), "stop"),
    Ledger(None),
    worker_pool.EncodingWork(EncodedStore(print, Path(sys.argv[3])), workers=2, progress=show),
)
"""


@pytest.mark.parametrize("request_", [signal.SIGINT, signal.SIGKILL])
def test_the_workers_end_with_the_process(
    shared_data: Path, tmp_path: Path, request_: signal.Signals
) -> None:
    source = write(tmp_path / "p.jsonl", [pair("word " * 300, "It.", "No.")] * 8_000)
    tokenizer = str(shared_data / "tokenizers" / "mistral_v1_32000")
    command = [sys.executable, "-c", _LONG, tokenizer, source.path, str(tmp_path / "store")]
    with subprocess.Popen(
        command, env=NEW, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        while run.stdout.readline() != "done\n":
            assert run.poll() is None
        workers = psutil.Process(run.pid).children()
        assert len(workers) == 2
        run.send_signal(request_)
        run.communicate(timeout=30)
        assert run.returncode != 0
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    left = [entry.name for entry in (tmp_path / "store").iterdir()]
    # Nothing under an entry's name; what a killed process wrote aside is for the next prune.
    assert all(name.startswith(".") for name in left)
    assert not left or request_ == signal.SIGKILL


def test_memory_does_not_grow_with_the_data(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = str(shared_data / "tokenizers" / "mistral_v1_32000")
    peaks = []
    for count in (500, 4_500):
        text = json.dumps(pair("word " * 200, "It is so. " * 60, "Not so. " * 60))
        source = tmp_path / f"{count}.jsonl"
        source.write_text((text + "\n") * count)
        code = _LONG.replace("16, 2", "64, 2").replace(' print("started', ' 0 and print("started')
        code = code.replace('print("done", flush=True)', "None")
        command = [sys.executable, "-c", code, tokenizer, str(source), str(tmp_path / "store")]
        with subprocess.Popen(command, env=NEW) as run:
            peak = 0
            while run.poll() is None:
                peak = max(peak, _resident(run.pid))
                time.sleep(0.05)
            assert run.returncode == 0
        peaks.append(peak)
    # 4,000 more records of about 700 tokens: 22 MB as arrays, almost a quarter gigabyte as lists.
    assert peaks[1] - peaks[0] < 22 * 2**20


def _resident(pid: int) -> int:
    total = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children()):
            total += one.memory_info().rss
    except psutil.Error:
        pass
    return total
