"""Encoded data on disk: the same trees, found by content alone, never half of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tandem.data.encoded.dataset import EncodedDataset, sequence_digest
from tandem.data.encoded.dataset_store import DatasetWriter, EncodedStore
from tandem.data.encoded.encode_chunk import EncodingOptions, encode_chunk
from tandem.data.encoded.example import Example
from tandem.data.ledger import Ledger
from tandem.data.sources.chunks import RowChunk
from tandem.data.tokenize.chat_template import ChatTemplate, resolve_template
from tandem.data.tokenize.encode import ChatTokenizer
from tandem.data.truncation.limits import Limits
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource
from tandem.storage.cache_folder import cache_report, clear_cache

from .built import prepare_conversations, prepare_pairs
from .test_prepare import pair, talk, write


@dataclass
class Desk:
    """Prepares pairs with a store in a folder of its own, and looks at what happened."""

    folder: Path
    said: list[str]
    ledger: Ledger

    def prepare(
        self, sources: list[DataSource], tokenizer: Any, kind: Any = prepare_pairs, **options: Any
    ) -> EncodedDataset:
        template = options.pop("template", None) or resolve_template(tokenizer, "neural-chat")
        options = {"max_length": 512, **options}
        self.said.clear()
        self.ledger = Ledger(None)
        store = EncodedStore(self.said.append, self.folder)
        trees: EncodedDataset = kind(
            sources,
            tokenizer=tokenizer,
            template=template,
            ledger=self.ledger,
            store=store,
            **options,
        )
        return trees

    def entries(self) -> set[str]:
        return {entry.name for entry in self.folder.iterdir()} if self.folder.exists() else set()


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "store", [], Ledger(None))


@pytest.fixture
def source(tmp_path: Path) -> DataSource:
    rows: list[Any] = [pair(f"What is {n}?", f"It is {n}.", f"Not {n}.") for n in range(9)]
    rows[3] = pair("What?", "Same.", "Same.")
    rows[5] = pair("word " * 800, "Long.", "Short.")
    return write(tmp_path / "p.jsonl", rows)


def same(a: Example, b: Example) -> bool:
    parts = zip((a.prefix, *a.branches), (b.prefix, *b.branches), strict=True)
    return a.origin == b.origin and all(
        np.array_equal(x.input_ids, y.input_ids) and np.array_equal(x.trained, y.trained)
        for x, y in parts
    )


@pytest.mark.parametrize(
    ("name", "every", "kind"),
    [
        ("conversations/slimorca_format.jsonl", 16, prepare_conversations),
        ("pairs/mixed_pairs.jsonl", 4, prepare_pairs),
    ],
)
def test_every_tree_and_count_is_that_of_the_record(
    shared_data: Path,
    mistral_tokenizer: Any,
    desk: Desk,
    tmp_path: Path,
    name: str,
    every: int,
    kind: Callable[..., EncodedDataset],
) -> None:
    from tandem.data.encoded import encode_chunk

    direct: list[Example] = []
    original = encode_chunk.to_arrays

    def watched(trees: list[Example], prompts: list[int]) -> Any:
        direct.extend(trees)
        return original(trees, prompts)

    # More than a piece is read at once.
    rows: list[Any] = (shared_data / name).read_text().rstrip("\n").split("\n")
    sources = [write(tmp_path / "rows.jsonl", rows[::every])]
    limits = {"max_length": 1536, "max_prompt_length": 1024}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_chunk, "to_arrays", watched)
        desk.prepare(sources, mistral_tokenizer, kind, workers=1, **limits)
    assert len(direct) > 400
    trees = desk.prepare(sources, mistral_tokenizer, kind, **limits)
    assert len(trees) == len(direct)
    assert all(same(ours, theirs) for ours, theirs in zip(trees, direct, strict=True))
    assert trees.fed.tolist() == [tree.fed for tree in direct]
    sequences = [tree.sequence(b) for tree in direct for b in range(len(tree.branches))]
    assert trees.sequence_lengths.tolist() == [len(one.input_ids) for one in sequences]
    assert trees.sequence_targets.tolist() == [int(one.trained.sum()) for one in sequences]
    assert trees.prompt_lengths.tolist() == [
        int((~tree.sequence(0).trained).sum()) for tree in direct
    ]
    assert b"".join(trees.all_digests()) == b"".join(
        sequence_digest(tree.prefix, branch) for tree in direct for branch in tree.branches
    )
    assert trees.digests(300, 303).tobytes() == b"".join(
        sequence_digest(tree.prefix, branch) for tree in direct[300:303] for branch in tree.branches
    )


def test_trees_are_a_sequence(source: DataSource, stories_tokenizer: Any, desk: Desk) -> None:
    trees = desk.prepare([source], stories_tokenizer)
    assert len(trees) == 8
    assert [tree.origin.row for tree in trees] == [1, 2, 3, 5, 6, 7, 8, 9]
    assert [tree.origin.row for tree in trees[-2:]] == [8, 9]
    assert trees[-1].origin == trees[7].origin
    with pytest.raises(IndexError):
        trees[8]


def test_a_second_start_tells_the_same_without_encoding(
    source: DataSource, stories_tokenizer: Any, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = list(desk.prepare([source], stories_tokenizer))
    told = (desk.ledger.entries, desk.ledger.formats, desk.ledger.summary())
    assert desk.ledger.counts == {"read": 9, "trained": 8, "truncated": 1, "dropped": 1}
    assert [entry.row for entry in desk.ledger.entries] == [4, 6]

    def encode(*_: Any) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("tandem.data.encoded.worker_pool.encode_chunk", encode)
    again = desk.prepare([source], stories_tokenizer)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert (desk.ledger.entries, desk.ledger.formats, desk.ledger.summary()) == told
    assert desk.said == []


def test_where_data_lies_plays_no_part(
    source: DataSource, stories_tokenizer: Any, desk: Desk, tmp_path: Path
) -> None:
    desk.prepare([source], stories_tokenizer)
    elsewhere = tmp_path / "else" / "where.jsonl"
    elsewhere.parent.mkdir()
    shutil.copy(source.path, elsewhere)
    trees = desk.prepare([DataSource(path=str(elsewhere))], stories_tokenizer)
    assert len(desk.entries()) == 1
    assert trees[0].origin.file == str(elsewhere)
    assert {entry.file for entry in desk.ledger.entries} == {str(elsewhere)}
    assert desk.ledger.formats == {str(elsewhere): "orca_dpo_pairs"}


def test_everything_that_ids_depend_on_misses(
    source: DataSource, stories_tokenizer: Any, desk: Desk, tmp_path: Path
) -> None:
    from tokenizers import AddedToken

    def entries_after(**options: Any) -> int:
        desk.prepare(options.pop("sources", [source]), stories_tokenizer, **options)
        return len(desk.entries())

    assert entries_after() == entries_after() == 1
    assert entries_after(max_length=500) == 2
    assert entries_after(max_prompt_length=100) == 3
    assert entries_after(on_bad_record="drop") == 4
    assert entries_after(too_long="keep_end") == 5
    plain = resolve_template(stories_tokenizer, "neural-chat")
    assert entries_after(template=replace(plain, name="called otherwise")) == 5
    other = ChatTemplate("neural-chat", plain.source.replace("### User", "## User"))
    assert entries_after(template=other) == 6
    assert entries_after(sources=[source, source]) == 7
    changed = tmp_path / "changed.jsonl"
    content = Path(source.path).read_bytes()
    changed.write_bytes(content.replace(b"It is 7.", b"It is 6."))
    assert entries_after(sources=[DataSource(path=str(changed))]) == 8
    stories_tokenizer.eos_token, before = "<unk>", stories_tokenizer.eos_token
    assert entries_after(template=plain) == 9
    stories_tokenizer.eos_token = before
    assert entries_after() == 9
    backend = stories_tokenizer.backend_tokenizer
    kept = backend.to_str()
    backend.add_special_tokens([AddedToken("What is")])
    try:
        assert entries_after(template=plain) == 10
    finally:
        stories_tokenizer._tokenizer = type(backend).from_str(kept)
    assert entries_after() == 10


@pytest.mark.parametrize("name", ["ids", "trained", "lengths", "rows", "ledger", "entry.json"])
@pytest.mark.parametrize("damage", ["a byte", "the end", "all"])
def test_a_damaged_entry_is_made_again_with_a_line(
    source: DataSource, stories_tokenizer: Any, desk: Desk, name: str, damage: str
) -> None:
    first = list(desk.prepare([source], stories_tokenizer))
    (entry,) = desk.folder.iterdir()
    content = bytearray((entry / name).read_bytes())
    if damage == "all":
        (entry / name).unlink()
    elif damage == "the end":
        (entry / name).write_bytes(content[: len(content) // 2])
    else:
        content[0 if name == "entry.json" else len(content) // 2] ^= 1
        (entry / name).write_bytes(content)
    again = desk.prepare([source], stories_tokenizer)
    assert len(desk.said) == 1
    assert f"{entry} is damaged" in desk.said[0]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    desk.prepare([source], stories_tokenizer)
    assert desk.said == []


def test_only_complete_preparations_are_kept(
    stories_tokenizer: Any, desk: Desk, tmp_path: Path
) -> None:
    bad = write(tmp_path / "p.jsonl", [*[pair("Q?", "A", "B")] * 300, "{"])
    with pytest.raises(UserError, match="row 301"):
        desk.prepare([bad], stories_tokenizer)
    nothing = write(tmp_path / "q.jsonl", [pair("Q?", "A", "A")])
    with pytest.raises(UserError, match="none of the 1 records"):
        desk.prepare([nothing], stories_tokenizer)
    assert desk.entries() == set()


def test_a_data_set_of_the_hub_is_loaded_once(
    stories_tokenizer: Any, desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = [{"ask": f"What is {n}?", "chosen": "This.", "rejected": "That."} for n in range(9)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    asked = []

    def load_dataset(*arguments: object, **options: object) -> Any:
        asked.append((*arguments, *options.values()))
        return datasets.load_from_disk(str(tmp_path / "saved"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("tandem.data.encoded.worker_pool._FEW", 0)  # as for large data
    hub = DataSource(path="made/pairs", fields={"question": "ask"})
    assert len(desk.prepare([hub], stories_tokenizer, workers=1)) == 9
    assert len(desk.prepare([hub], stories_tokenizer, workers=1, max_length=256)) == 9
    assert asked == [("made/pairs", None, "train", None)]
    assert (
        len(desk.prepare([hub.model_copy(update={"revision": "v1"})], stories_tokenizer, workers=1))
        == 9
    )
    assert len(asked) == 2


def test_a_file_that_changes_meanwhile_is_refused(
    source: DataSource, stories_tokenizer: Any, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*arguments: Any) -> Any:
        with Path(source.path).open("a") as file:
            file.write(json.dumps(pair("More?", "A", "B")) + "\n")
        return encode_chunk(*arguments)

    monkeypatch.setattr("tandem.data.encoded.worker_pool.encode_chunk", encode)
    with pytest.raises(UserError, match="changed while it was being read"):
        desk.prepare([source], stories_tokenizer)
    assert desk.entries() == set()


def test_a_store_that_cannot_be_written_costs_a_line(
    source: DataSource, stories_tokenizer: Any, desk: Desk, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    desk.folder = tmp_path / "file" / "store"
    trees = desk.prepare([source], stories_tokenizer)
    assert len(trees) == 8
    assert desk.ledger.counts["read"] == 9
    assert len(desk.said) == 1
    assert "cannot be kept" in desk.said[0]


def test_the_longest_unused_go_first_and_open_ones_stay_readable(
    stories_tokenizer: Any, desk: Desk, tmp_path: Path
) -> None:
    import os

    chat = ChatTokenizer.of(stories_tokenizer, resolve_template(stories_tokenizer, "neural-chat"))
    store = EncodedStore(desk.said.append, desk.folder)
    plan = EncodingOptions("conversations", Limits(512, None), "stop")
    (tmp_path / "c.jsonl").write_text(json.dumps(talk("Hi", "Hello")) + "\n")
    from tandem.data.sources.rows import read_rows

    rows = tuple(read_rows(DataSource(path=str(tmp_path / "c.jsonl"))))
    names = [str(tmp_path / "c.jsonl")]
    for number, key in enumerate("abcd"):
        with store.writing(key, names) as writer:
            writer.add(encode_chunk(chat, plan, RowChunk(names[0], 1, rows), "messages"))
            writer.finish({0: "messages"}, [1])
        os.utime(desk.folder / key, (number, number))
    found = store.find("b", names)
    oldest = store.dataset("a", names)
    size = sum(file.stat().st_size for file in (desk.folder / "a").iterdir())
    assert found is not None
    assert store.prune("c", limit_bytes=2 * size) == 2
    assert desk.entries() == {"b", "c"}
    assert oldest[0].origin.row == 1
    assert store.prune("c", limit_bytes=0) == 1
    assert desk.entries() == {"c"}
    abandoned = desk.folder / ".x.1.tmp"
    abandoned.mkdir()
    assert store.prune("c") == 0
    assert abandoned.exists()
    os.utime(abandoned, (0, 0))
    store.prune("c")
    assert desk.entries() == {"c"}


def test_the_cache_command_sees_and_empties_it(
    source: DataSource, stories_tokenizer: Any, desk: Desk, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    desk.folder = EncodedStore(print).folder
    desk.prepare([source], stories_tokenizer)
    ((name, size),) = cache_report()
    assert name == f"encoded/{next(iter(desk.entries()))}"
    assert size > 4 * int(desk.prepare([source], stories_tokenizer).fed.sum())
    assert clear_cache() == size
    assert cache_report() == []
    assert desk.entries() == set()


def test_masks_keep_their_place_whatever_the_batches(stories_tokenizer: Any) -> None:
    chat = ChatTokenizer.of(stories_tokenizer, resolve_template(stories_tokenizer, "neural-chat"))
    plan = EncodingOptions("preference pairs", Limits(512, None), "stop")
    from tandem.data.records import Origin
    from tandem.data.sources.chunks import Row

    fields: list[dict[str, object]] = [
        dict(pair("Why " * n + "?", "A" * n, "B " * n)) for n in range(1, 40)
    ]
    rows = [Row(one, Origin("f", n)) for n, one in enumerate(fields, 1)]
    results = []
    for size in (1, 3, 39):
        writer = DatasetWriter(None, ["f"])
        for at in range(0, 39, size):
            chunk = RowChunk("f", size, tuple(rows[at : at + size]))
            writer.add(encode_chunk(chat, plan, chunk, "orca_dpo_pairs"))
        writer.finish({0: "orca_dpo_pairs"}, [39])
        results.append(list(writer.dataset()))
    assert len(results[0]) == 39
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other, strict=True))
