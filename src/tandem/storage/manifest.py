"""A stage folder's manifest: what went in, what came out, and whether it is finished."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from tandem import __version__
from tandem.errors import UserError
from tandem.storage.atomic_files import atomic_write_json, remove_left_behind
from tandem.storage.hashing import Damaged, hash_each, hash_file, hash_json, read_object, sealed

State = Literal["fresh", "resume", "finished"]
NAME = "manifest.json"
# Files that operating systems, file managers and file servers put into folders.
_FOREIGN = (
    "lost+found", ".snapshot", ".snapshots", ".zfs", ".nfs*", ".fuse_hidden*", ".Trash-*",
    ".Trashes", ".DS_Store", "._*", ".Spotlight-V100", ".fseventsd", ".TemporaryItems", ".apdisk",
    "System Volume Information", "$RECYCLE.BIN", "desktop.ini", "Thumbs.db", ".directory",
    "@eaDir", "#recycle", "#snapshot", ".glusterfs", ".gitkeep", ".gitignore", ".keep",
)  # fmt: skip
_IGNORED = (NAME, ".lock")
_KINDS = {
    "stage": str, "status": str, "inputs": dict, "schedule": dict, "outputs": dict,
    "started_at": str,
}  # fmt: skip
_WAY_OUT = "Restore it, or use another folder."
# The numbers of a schedule, each with a bound that no machine reaches.
_COUNTS = {"threads": 2**16, "processes": 2**20, "tokens_per_microbatch": 2**40}
# Outputs that report what was done; nothing is computed from them.
_TOLD_ONLY = ("summary.json", "metrics.jsonl", "validation.jsonl", "data-ledger.jsonl", "README.md")
# Files on their way to their final names, which a killed process leaves behind.
_ASIDE = ".*.tmp"


@dataclass(frozen=True)
class Opened:
    """The state of a stage's folder, and the schedule (token budget, threads) of earlier starts."""

    state: State
    schedule: dict[str, Any]


def open_stage(folder: Path, stage: str, inputs: Mapping[str, Any]) -> Opened:
    """Compare a stage folder with a stage's inputs, and write nothing.

    Half-written files of ended processes are removed from a finished stage's folder. An unfinished
    stage with other inputs and no checkpoint is started afresh, because nothing is lost. Raises
    UserError if the folder holds another stage, other inputs, or files that are not tandem's.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        check_empty(folder)
        return Opened("fresh", {})
    state, recorded = manifest["status"], manifest["inputs"]
    if manifest["stage"] != stage:
        raise UserError(
            f"{folder} holds a {state} {manifest['stage']} stage, and this is {stage}. Choose "
            "another output folder."
        )
    if recorded != _plain(inputs):
        if state != "finished" and not any(folder.glob("checkpoints/step-*")):
            return Opened("fresh", {})
        changes = difference(recorded, _plain(inputs))
        listing = "\n".join(f"  {key}: {old!r} -> {new!r}" for key, old, new in changes)
        raise UserError(
            f"{folder} holds a {state} {stage} stage with other inputs (there -> now):\n"
            f"{listing}\nUse the same inputs to continue it, choose another output folder, or "
            f"remove {folder} to start it afresh."
        )
    if state == "finished":
        remove_left_behind(folder)
        check_outputs(folder, manifest["outputs"])
        return Opened("finished", manifest["schedule"])
    return Opened("resume", manifest["schedule"])


def start_stage(
    folder: Path, stage: str, inputs: Mapping[str, Any], schedule: Mapping[str, Any]
) -> None:
    """Record that a stage has begun, or resumed; remove half-written files of ended processes."""
    path = folder / NAME
    plain = _plain(inputs)
    before = read_manifest(folder)
    started = before["started_at"] if before and before["inputs"] == plain else _now()
    remove_left_behind(folder)
    record = {
        "stage": stage,
        "status": "running",
        "inputs": plain,
        "inputs_hash": hash_json(plain),
        "schedule": dict(schedule),
        "versions": versions(),
        "outputs": {},
        "started_at": started,
        "finished_at": None,
    }
    atomic_write_json(path, sealed(record))


def is_finished(folder: Path) -> bool:
    """Whether a folder has a finished stage; raise Damaged if its manifest cannot be a stage's."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest["status"] == "finished"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest in a stage folder, if any; raise Damaged if it cannot be a stage's."""
    path = folder / NAME
    if not path.exists() and not path.is_symlink():
        return None
    manifest = read_object(path, _KINDS, _WAY_OUT)
    wrong = [
        f"{key} {manifest['schedule'][key]!r}"
        for key, most in _COUNTS.items()
        if key in manifest["schedule"] and manifest["schedule"][key] not in range(1, most)
    ]
    if manifest["status"] not in ("running", "finished"):
        wrong.append(f"status {manifest['status']!r}")
    wrong += [
        f"output {name!r}" for name, one in manifest["outputs"].items() if type(one) is not str
    ]
    if wrong:
        raise Damaged(f"{path} cannot be used: it says {', '.join(wrong)}. {_WAY_OUT}")
    return manifest


def check_empty(folder: Path) -> None:
    """Raise UserError for a folder without a manifest that has files which are not tandem's."""
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    passed_over = (*_IGNORED, _ASIDE, *_FOREIGN)
    present = [n for n in names if not any(fnmatchcase(n, one) for one in passed_over)]
    if present:
        raise UserError(
            f"{folder} is not empty and was not written by tandem, or its {NAME} is gone "
            f"(found {', '.join(sorted(present)[:5])}). Choose another output folder."
        )


def finish_stage(folder: Path, outputs: list[str]) -> None:
    """Record the output files with their hashes; from now on the stage counts as finished."""
    manifest = read_manifest(folder)
    assert manifest is not None, "start_stage wrote it"
    names = sorted(outputs)
    hashes = hash_each(folder / name for name in names)
    manifest["outputs"] = dict(zip(names, hashes, strict=True))
    manifest["status"] = "finished"
    manifest["finished_at"] = _now()
    atomic_write_json(folder / NAME, sealed(manifest))


def versions() -> dict[str, str]:
    """Return the versions of the packages on which results depend, without importing them."""
    numbers = {"tandem": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "tokenizers"):
        numbers[name] = _version(name)
    with suppress(metadata.PackageNotFoundError):  # an extra
        numbers["bitsandbytes"] = _version("bitsandbytes")
    return numbers


@cache
def _version(name: str) -> str:
    """A package's version, looked up once: a package's page is parsed as a whole for it."""
    return metadata.version(name)


def difference(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Return the leaves in which two plain values differ, as (dotted key, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            leaf
            for name in sorted(old.keys() | new.keys())
            for leaf in difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if old == new else [(key, old, new)]


def check_outputs(folder: Path, outputs: Mapping[str, str]) -> None:
    """Raise UserError for an output of a finished stage that was changed or removed."""
    for name in _changed(folder, outputs):
        raise UserError(
            f"{folder / name} is missing or was changed after the stage finished. "
            f"Remove {folder} to make it again."
        )


def check_made(folder: Path, log: Callable[[str], None], *, weights: bool = True) -> None:
    """Compare a model's or an adapter's folder with the outputs of the stage that made it.

    A folder without a finished stage passes. Files beside the weights may have been changed on
    purpose: `log` reports their names. Raises UserError for weights that were damaged or replaced.
    Comparing the `weights` means reading them, which takes time.
    """
    try:
        manifest = read_manifest(folder)
    except Damaged as error:  # perhaps another program's
        log(f"{error} What lies beside it is used as it is.")
        return
    if manifest is None or manifest["status"] != "finished":
        return
    outputs = {
        name: digest
        for name, digest in manifest["outputs"].items()
        if weights or not name.endswith(".safetensors")
    }
    changed = _changed(folder, outputs)
    if spoilt := [name for name in changed if name.endswith(".safetensors")]:
        raise UserError(
            f"{folder / spoilt[0]} is missing, damaged or was changed after the "
            f"{manifest['stage']} stage finished. Restore it, make {folder} again, or remove "
            f"{folder / NAME} to use it as it is."
        )
    if used := [name for name in changed if name not in _TOLD_ONLY]:
        log(
            f"{folder} is not as the {manifest['stage']} stage left it: changed or missing are "
            f"{', '.join(used)}"
        )


def _changed(folder: Path, outputs: Mapping[str, str]) -> list[str]:
    return [
        name
        for name, digest in outputs.items()
        if not (folder / name).is_file() or hash_file(folder / name) != digest
    ]


def _plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    # Through JSON and back, so that tuples and lists compare equal.
    plain: dict[str, Any] = json.loads(json.dumps(dict(inputs)))
    return plain


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
