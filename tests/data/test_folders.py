"""Which files of a folder are data, and of which split: as `datasets` tells it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from tandem.data.sources.local_files import look_into
from tandem.data.sources.rows import local_files, not_read
from tandem.errors import UserError
from tandem.recipe.data_source import DataSource

ROW = '{"prompt": "Why?", "completion": "So."}\n'


def lay(root: Path, *names: str) -> Path:
    """A folder with one row in each of these files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(ROW)
    return root


def names_of(root: Path, split: str = "train") -> list[str]:
    return [str(file.relative_to(root)) for file in local_files(str(root), split)]


WORDS = (
    *("train", "training", "validation", "valid", "dev", "val", "test", "testing", "eval"),
    *("evaluation", "trained", "unit", "evaluate", "data", "part", "stories", "devel", "2", "a"),
)


def invented(noise: random.Random) -> list[str]:
    """A few paths whose names state splits, look as if they did, or say nothing."""

    def name() -> str:
        between = noise.choice(["-", "_", ".", " ", "", "0", "+"])
        return between.join(noise.choice(WORDS) for _ in range(noise.choice([1, 1, 2, 3])))

    paths = set()
    for _ in range(noise.randint(1, 5)):
        folders = [noise.choice([name(), "data"]) for _ in range(noise.choice([0, 0, 1, 1, 2]))]
        shard = noise.choice(["", "", "", "-00000-of-00001", "-00001-of-00002-abc"])
        paths.add("/".join([*folders, name() + shard + noise.choice([".jsonl", ".json"])]))
    return sorted(paths)


def test_splits_are_those_that_datasets_finds(tmp_path: Path) -> None:
    from datasets.data_files import DataFilesDict, get_data_patterns

    noise = random.Random(14)
    stated = 0
    for number in range(60):
        root = lay(tmp_path / f"{number}", *invented(noise))
        base = str(root)
        try:
            patterns = get_data_patterns(base)
        except ValueError:  # a shard's name that can be no split's
            continue
        theirs = {
            # A file that states a split twice is there twice.
            str(split): sorted({os.path.relpath(file, base) for file in files})
            for split, files in DataFilesDict.from_patterns(patterns, base_path=base).items()
        }
        ours = {split: sorted(names_of(root, split)) for split in look_into(root).splits}
        assert ours == theirs, patterns
        stated += list(theirs) != ["train"]
    assert stated > 15


def test_synonyms_of_a_split_are_one(tmp_path: Path) -> None:
    root = lay(tmp_path, "train.jsonl", "dev.jsonl", "evaluation.jsonl")
    assert names_of(root, "training") == ["train.jsonl"]
    assert names_of(root, "validation") == names_of(root, "val") == ["dev.jsonl"]
    assert names_of(root, "test") == ["evaluation.jsonl"]
    with pytest.raises(UserError, match="no files of split 'extra'; its files belong to: test, tr"):
        names_of(root, "extra")


def test_case_makes_no_difference(tmp_path: Path) -> None:
    root = lay(tmp_path, "Train.JSONL", "Test.jsonl")
    assert names_of(root) == ["Train.JSONL"]


def test_shards_of_any_split_go_by_their_own_names(tmp_path: Path) -> None:
    root = lay(
        tmp_path, "data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"
    )
    assert names_of(root, "train_sft") == ["data/train_sft-00000-of-00001.jsonl"]
    with pytest.raises(UserError, match="belong to: test_sft, train_sft"):
        names_of(root)


def test_what_of_a_folder_is_left_out_is_said(tmp_path: Path) -> None:
    root = lay(
        tmp_path / "data", "train.jsonl", "val.jsonl", "extra.jsonl", "README.md", "more.zip",
        "._train.jsonl", "~$train.csv", ".cache/x.jsonl", "__MACOSX/train.jsonl", "Thumbs.db",
    )  # fmt: skip
    (line,) = not_read([DataSource(path=str(root))])
    assert line == (
        f"not read of {root}: val.jsonl (split validation); ._train.jsonl (hidden); extra.jsonl "
        "(states no split, and others do); more.zip (of no kind that is read); ~$train.csv (the "
        "lock of an open document)"
    )
    assert names_of(root) == ["train.jsonl"]
    # What another source reads is not left out.
    (line,) = not_read([DataSource(path=str(root)), DataSource(path=str(root), split="validation")])
    assert "val.jsonl" not in line
    assert not_read([DataSource(path=str(root / "train.jsonl"))]) == []
    assert not_read([DataSource(path=str(lay(tmp_path / "whole", "a.jsonl", "b.jsonl")))]) == []


def test_many_files_that_are_left_out_are_counted(tmp_path: Path) -> None:
    root = lay(tmp_path, "train.jsonl", *(f"test-{i}.jsonl" for i in range(9)))
    (line,) = not_read([DataSource(path=str(root))])
    assert line.endswith("test-0.jsonl, test-1.jsonl, test-2.jsonl and 6 more (split test)")


@pytest.mark.parametrize(
    "manifest",
    [
        {"stage": "sft", "status": "running", "inputs": {}},
        {"stages": {"1-sft": {}}, "versions": {}},
    ],
)
def test_the_folder_of_a_run_is_no_data(tmp_path: Path, manifest: dict[str, object]) -> None:
    root = lay(tmp_path, "a.jsonl", "out/data-ledger.jsonl", "out/checkpoints/step-1/metrics.jsonl")
    (root / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert names_of(root) == ["a.jsonl"]
    assert not_read([DataSource(path=str(root))])[0].endswith("out (the folder of a run of tandem)")


def test_somebody_elses_manifest_is_no_runs(tmp_path: Path) -> None:
    root = lay(tmp_path, "some/a.jsonl", "more/b.jsonl", "last/c.jsonl")
    (root / "some" / "manifest.json").write_text('{"stage": "sft"}')
    (root / "more" / "manifest.json").write_text("[" * 100_000)
    assert {"last/c.jsonl", "more/b.jsonl", "some/a.jsonl"} <= set(names_of(root))


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = lay(tmp_path / "hub", "blobs/0af3")
    (root / "snapshots").mkdir()
    (root / "snapshots" / "a.jsonl").symlink_to("../blobs/0af3")
    (root / "snapshots" / "again").symlink_to("..")
    (root / "snapshots" / "self").symlink_to("self")
    assert names_of(root) == ["snapshots/a.jsonl"]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "there").symlink_to(root / "snapshots")
    assert names_of(tmp_path / "linked") == ["there/a.jsonl"]


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    root = lay(tmp_path, "a.jsonl")
    os.mkfifo(root / "b.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl is a pipe, socket or device"):
        names_of(root)
    with pytest.raises(UserError, match=r"b\.jsonl is a pipe, socket or device"):
        local_files(str(root / "b.jsonl"))
    (root / "b.jsonl").unlink()
    (root / "c.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"c\.jsonl is a link that leads nowhere\. Fetch"):
        names_of(root)


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    root = lay(tmp_path, "rows.xlsx")
    with pytest.raises(UserError, match=r"holds no .*It holds: rows\.xlsx \(of no kind"):
        names_of(root)


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = lay(tmp_path, "a.jsonl", "secret/b.jsonl")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="secret cannot be listed"):
        names_of(root)
