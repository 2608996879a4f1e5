"""A stage folder's manifest: what went in, what came out, and whether it is finished."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from tandem import __version__
from tandem.artifact.files import atomic_write_json, read_json
from tandem.artifact.hashing import hash_file, hash_json
from tandem.errors import UserError

State = Literal["fresh", "resume", "finished"]
NAME = "manifest.json"
# What operating systems, file managers and file servers put into folders of their own accord.
_FOREIGN = (
    "lost+found", ".snapshot", ".snapshots", ".zfs", ".nfs*", ".fuse_hidden*", ".Trash-*",
    ".Trashes", ".DS_Store", "._*", ".Spotlight-V100", ".fseventsd", ".TemporaryItems", ".apdisk",
    "System Volume Information", "$RECYCLE.BIN", "desktop.ini", "Thumbs.db", ".directory",
    "@eaDir", "#recycle", "#snapshot", ".glusterfs", ".gitkeep", ".gitignore", ".keep",
)  # fmt: skip
_IGNORED = (NAME, ".lock")
_KEYS = ("stage", "status", "inputs", "schedule", "outputs", "started_at")
# Files on their way to their final names, which a killed process leaves behind.
_ASIDE = ".*.tmp"


@dataclass(frozen=True)
class Opened:
    """What a stage finds in its folder: a fresh start, work to resume, or a finished result.

    `schedule` is what an earlier start resolved (token budget, threads) and a resumed one reuses.
    """

    state: State
    schedule: dict[str, Any]


def open_stage(folder: Path, stage: str, inputs: Mapping[str, Any]) -> Opened:
    """Compare a stage folder with what is asked for; write nothing.

    An unfinished stage with other inputs that has no checkpoint yet is started afresh: there is
    nothing in it to lose.

    Raises UserError if the folder holds a stage with other inputs, or files of someone else's.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        _check_empty(folder)
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
        _check_outputs(folder, manifest["outputs"])
        return Opened("finished", manifest["schedule"])
    return Opened("resume", manifest["schedule"])


def start_stage(
    folder: Path, stage: str, inputs: Mapping[str, Any], schedule: Mapping[str, Any]
) -> None:
    """Record that a stage has begun; on a resume, keep when it first did.

    The caller holds the folder's lock, so half-written files in it are a killed process's.
    """
    path = folder / NAME
    plain = _plain(inputs)
    before = read_manifest(folder)
    started = before["started_at"] if before and before["inputs"] == plain else _now()
    for aside in (*folder.glob(_ASIDE), *folder.glob(f"*/{_ASIDE}")):
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
    atomic_write_json(
        path,
        {
            "stage": stage,
            "status": "running",
            "inputs": plain,
            "inputs_hash": hash_json(plain),
            "schedule": dict(schedule),
            "versions": versions(),
            "outputs": {},
            "started_at": started,
            "finished_at": None,
        },
    )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest in a stage folder, None when there is none.

    Raises UserError for one that is damaged or no stage's.
    """
    path = folder / NAME
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = read_json(path)
        missing = [key for key in _KEYS if key not in manifest]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Restore it, or use another folder."
        ) from None
    if missing or not isinstance(manifest, dict):
        raise UserError(f"{path} is no manifest of a stage. Restore it, or use another folder.")
    return manifest


def _check_empty(folder: Path) -> None:
    found = folder.iterdir() if folder.exists() else ()
    passed_over = (*_IGNORED, _ASIDE, *_FOREIGN)
    names = [path.name for path in found]
    present = [n for n in names if not any(fnmatchcase(n, one) for one in passed_over)]
    if present:
        raise UserError(
            f"{folder} is not empty and was not written by tandem "
            f"(found {', '.join(sorted(present)[:5])}). Choose another output folder."
        )


def finish_stage(folder: Path, outputs: list[str]) -> None:
    """Record the output files with their hashes; from here on the stage counts as finished."""
    manifest = read_json(folder / NAME)
    manifest["outputs"] = {name: hash_file(folder / name) for name in sorted(outputs)}
    manifest["status"] = "finished"
    manifest["finished_at"] = _now()
    atomic_write_json(folder / NAME, manifest)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, without importing any of it."""
    found = {"tandem": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "accelerate", "tokenizers"):
        found[name] = metadata.version(name)
    with suppress(metadata.PackageNotFoundError):  # an extra
        found["bitsandbytes"] = metadata.version("bitsandbytes")
    return found


def difference(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves in which two plain values differ, as (dotted key, old, new)."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted(old.keys() | new.keys()):
            inner = f"{key}.{name}" if key else name
            found += difference(old.get(name), new.get(name), inner)
        return found
    return [] if old == new else [(key, old, new)]


def _check_outputs(folder: Path, outputs: Mapping[str, str]) -> None:
    for name, digest in outputs.items():
        path = folder / name
        if not path.exists() or hash_file(path) != digest:
            raise UserError(
                f"{path} is missing or was changed after the stage finished. "
                f"Remove {folder} to make it again."
            )


def _plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    # Through JSON and back, so that tuples and lists compare equal.
    plain: dict[str, Any] = json.loads(json.dumps(dict(inputs)))
    return plain


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
