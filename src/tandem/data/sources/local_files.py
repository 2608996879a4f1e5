"""Sort the files of a folder into data, by split as the `datasets` library does, and the rest."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.data.sources.file_chunks import KINDS, is_data
from tandem.errors import UserError

# Descriptions that lie beside the data in saved and downloaded data sets.
_NOT_DATA = {
    "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json",
}  # fmt: skip
_PAPERS = ("readme", "license", "licence", "changelog", "citation", "contributing", "authors")
_OF_SYSTEMS = {"thumbs.db", "desktop.ini", "makefile"}
# The keywords of `datasets`, by the split that they state.
_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_BETWEEN = r"[-._ 0-9]"
_OF_FOLDER = {
    split: re.compile(rf"(?i:(.*{_BETWEEN})?({'|'.join(words)})({_BETWEEN}.*)?)", re.DOTALL)
    for split, words in _KEYWORDS.items()
}
_OF_FILE = {
    split: re.compile(rf"(?i:(.*{_BETWEEN})?({'|'.join(words)}){_BETWEEN}.*)", re.DOTALL)
    for split, words in _KEYWORDS.items()
}
# As `datasets` writes data sets for the Hub: in the folder `data`, with any name of a split.
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}.*\..*", re.DOTALL)
_SHOWN = 3  # names that a message has of each reason


@dataclass(frozen=True, slots=True)
class Folder:
    """The data files of each split of a folder, in name order, and other paths with the reason."""

    root: Path
    splits: Mapping[str, tuple[Path, ...]]
    passed_over: tuple[tuple[Path, str], ...]


def look_into(root: Path) -> Folder:
    """Sort the files in a folder and below it.

    Raises `UserError` for a folder that has no data, or cannot be listed.
    """
    paths = list(_walk(root))
    files = sorted(path for path, reason in paths if not reason)
    others = [(path, reason) for path, reason in paths if reason]
    if not files:
        holds = left_out(Folder(root, {}, tuple(others)), ())
        listed = f" It holds: {holds}." if holds else ""
        raise UserError(f"data: the folder {root} holds no {KINDS} file.{listed}")
    stated = _splits({file: file.relative_to(root).parts for file in files})
    known = {file for some in stated.values() for file in some}
    others += [(file, "states no split, and others do") for file in files if file not in known]
    return Folder(root, stated, tuple(sorted(others)))


def files_of(folder: Folder, split: str) -> list[Path]:
    """Return the files of a split in name order; synonyms such as `dev` and `validation` are one.

    Raises `UserError` when there are none, or one is no regular file.
    """
    name = same_split(split, folder.splits)
    if name is None:
        raise UserError(
            f"data: the folder {folder.root} has no files of split {split!r}; its files belong "
            f"to: {', '.join(sorted(folder.splits))}. Set `split` to one of those."
        )
    for file in folder.splits[name]:
        check_regular(file)
    return list(folder.splits[name])


def same_split(wanted: str, names: Sequence[str] | Mapping[str, object]) -> str | None:
    """Return the name itself if some splits have it, else its synonym among them, else None."""
    if wanted in names:
        return wanted
    means = _meaning(wanted)
    return next((name for name in names if _meaning(name) == means), None)


def check_regular(file: Path) -> None:
    """Raise `UserError` for a pipe, a socket or a broken link; reading might never end."""
    if file.is_file():
        return
    if file.is_symlink() and not file.exists():
        raise UserError(
            f"data: {file} is a link that leads nowhere. Fetch what it stands for, or remove it."
        )
    raise UserError(
        f"data: {file} is a pipe, socket or device, which cannot be read twice. Write its content "
        "to a file, and name that."
    )


def left_out(folder: Folder, read: Sequence[Path]) -> str:
    """Return in one line which files of a folder were not `read`, and why; empty for none."""
    splits = ((file, f"split {name}") for name, files in folder.splits.items() for file in files)
    by_reason: dict[str, list[str]] = {}
    gone = set(read)
    for path, reason in [*splits, *folder.passed_over]:
        if path not in gone:
            by_reason.setdefault(reason, []).append(str(path.relative_to(folder.root)))
    return "; ".join(f"{_names(some)} ({reason})" for reason, some in by_reason.items())


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files below a folder, each with the reason why it is no data; empty for data.

    Linked folders come last: one that is there anyway, or leads in a circle, is read once.
    """
    waiting, linked = [root], list[Path]()
    seen: set[str] = set()
    while waiting or linked:
        folder = waiting.pop() if waiting else linked.pop()
        place = os.path.realpath(folder)
        if place in seen:
            continue
        seen.add(place)
        for entry in _entries(folder):
            path = Path(entry.path)
            if not _is_folder(entry):
                reason = _no_data(entry)
                if reason is not None:
                    yield path, reason
            elif entry.name.startswith((".", "__")):
                continue
            elif _is_run(path):
                yield path, "the folder of a run of tandem"
            else:
                (linked if entry.is_symlink() else waiting).append(path)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"data: the folder {folder} cannot be listed: {error}.") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _no_data(entry: os.DirEntry[str]) -> str | None:
    """Return why a file is not read: empty if it is, None if nobody needs to be told."""
    name = entry.name.lower()
    if name in _NOT_DATA or name in _OF_SYSTEMS or name.endswith(".md"):
        return None
    if is_data(Path(entry.name)):
        if name.startswith("."):
            return "hidden"
        return "the lock of an open document" if name.startswith("~$") else ""
    if name.startswith((".", "~$")) or name.partition(".")[0] in _PAPERS:
        return None
    return "of no kind that is read"


def _is_run(folder: Path) -> bool:
    """Return whether a folder belongs to a run or its stage; its files are no data.

    Otherwise the files that a run writes would change what it reads when it resumes.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    keys = manifest.keys() if isinstance(manifest, dict) else set()
    return {"stage", "status", "inputs"} <= keys or {"stages", "versions"} <= keys


def _splits(files: Mapping[Path, tuple[str, ...]]) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split; where no file states a split, all are training data.

    As in `datasets`, shards decide, else folders' names, else files' names.
    """
    shards: dict[str, list[Path]] = {}
    for file, parts in files.items():
        shard = _SHARD.fullmatch(parts[-1])
        if shard and parts[:-1] == ("data",):
            shards.setdefault(shard[1], []).append(file)
    if shards:
        return _ordered(shards)
    by_folder: dict[str, list[Path]] = {}
    by_file: dict[str, list[Path]] = {}
    for file, parts in files.items():
        for split in _KEYWORDS:
            if any(_OF_FOLDER[split].fullmatch(part) for part in parts[:-1]):
                by_folder.setdefault(split, []).append(file)
            if _OF_FILE[split].fullmatch(parts[-1]):
                by_file.setdefault(split, []).append(file)
    return _ordered(by_folder or by_file or {"train": list(files)})


def _ordered(splits: Mapping[str, list[Path]]) -> dict[str, tuple[Path, ...]]:
    return {split: tuple(splits[split]) for split in sorted(splits)}


def _meaning(split: str) -> str:
    """Return the split that a keyword stands for; another name stands for itself."""
    word = split.lower()
    return next((name for name, words in _KEYWORDS.items() if word in words), split)
