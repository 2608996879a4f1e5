"""Which files of a folder are data, of which split, and what else lies there.

Splits are told as the `datasets` library tells them, by the names of folders and files.
"""

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
# Names that are said of each reason.
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Folder:
    """What lies in a folder: the data files of each split, in name order, and what no split has.

    Each path that is passed over has the reason beside it.
    """

    root: Path
    splits: Mapping[str, tuple[Path, ...]]
    passed_over: tuple[tuple[Path, str], ...]


def look_into(root: Path) -> Folder:
    """Sort what lies in a folder and below it.

    Raises `UserError` for a folder that holds no data, or cannot be listed.
    """
    files: list[Path] = []
    others: list[tuple[Path, str]] = []
    for path, reason in _walk(root):
        if reason:
            others.append((path, reason))
        else:
            files.append(path)
    if not files:
        raise UserError(f"data: the folder {root} holds no {KINDS} file.{_listed(root, others)}")
    files.sort()
    stated = _splits({file: file.relative_to(root).parts for file in files})
    known = {file for some in stated.values() for file in some}
    others += [
        (file, "states no split, and others do") for file in files if file not in known
    ]  # fmt: skip
    return Folder(root, stated, tuple(sorted(others)))


def files_of(folder: Folder, split: str) -> list[Path]:
    """The files of a split, in name order; synonyms such as `dev` and `validation` are one.

    Raises `UserError` when there are none, or one that can be no data.
    """
    chosen = folder.splits[name] if (name := same_split(split, folder.splits)) is not None else ()
    if not chosen:
        found = ", ".join(sorted(folder.splits))
        raise UserError(
            f"data: the folder {folder.root} has no files of split {split!r}; its files belong "
            f"to: {found}. Set `split` to one of those."
        )
    for file in chosen:
        check_regular(file)
    return list(chosen)


def same_split(wanted: str, names: Sequence[str] | Mapping[str, object]) -> str | None:
    """That of some splits which is meant by a name: itself, else a synonym; None without any."""
    if wanted in names:
        return wanted
    means = _meaning(wanted)
    return next((name for name in names if _meaning(name) == means), None)


def check_regular(file: Path) -> None:
    """Raise `UserError` for a pipe, a socket or a broken link: reading might never end."""
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
    """What of a folder is not among the files `read`, and why, in one line; empty for nothing."""
    splits = [
        (file, f"split {split}") for split, files in folder.splits.items() for file in files
    ]  # fmt: skip
    gone = set(read)
    by_reason: dict[str, list[str]] = {}
    for path, reason in [*splits, *folder.passed_over]:
        if path not in gone:
            by_reason.setdefault(reason, []).append(str(path.relative_to(folder.root)))
    return "; ".join(f"{_names(some)} ({reason})" for reason, some in by_reason.items())


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _listed(root: Path, others: Sequence[tuple[Path, str]]) -> str:
    """What a folder without data holds, for the message."""
    said = left_out(Folder(root, {}, tuple(others)), ())
    return f" It holds: {said}." if said else ""


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Files of data below a folder, and what is none, with the reason.

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
    """Why a file is not read: empty if it is read, None if it is passed over without a line."""
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
    """Whether a folder belongs to a run, or to one of its stages, so that its files are not data.

    Otherwise what a run has written would change what it reads when it resumes.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(manifest, dict):
        return False
    return {"stage", "status", "inputs"} <= manifest.keys() or {"stages", "versions"} <= (
        manifest.keys()
    )


def _splits(files: Mapping[Path, tuple[str, ...]]) -> dict[str, tuple[Path, ...]]:
    """The files of each split; those that state none are training data where none states one.

    What is tried comes in the order of `datasets`: shards, folders' names, files' names. The first
    that says anything of any file says it all.
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
    """The split that a keyword stands for; another name stands for itself."""
    word = split.lower()
    return next((name for name, words in _KEYWORDS.items() if word in words), split)
