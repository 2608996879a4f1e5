"""A stage folder's manifest: what went in, what came out, and whether it is finished."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from tandem import __version__
from tandem.artifact.files import atomic_write_json, read_json
from tandem.artifact.hashing import hash_file, hash_json
from tandem.errors import UserError

State = Literal["fresh", "resume", "finished"]
NAME = "manifest.json"
_IGNORED = {NAME, ".lock"}


@dataclass(frozen=True)
class Opened:
    """What a stage finds in its folder: a fresh start, work to resume, or a finished result.

    `schedule` is what an earlier start resolved (token budget, threads) and a resumed one reuses.
    """

    state: State
    schedule: dict[str, Any]


def open_stage(folder: Path, stage: str, inputs: Mapping[str, Any]) -> Opened:
    """Compare a stage folder with what is asked for; write nothing.

    Raises UserError if the folder holds a stage with other inputs, or files of someone else's.
    """
    path = folder / NAME
    if not path.exists():
        found = folder.iterdir() if folder.exists() else ()
        present = [path.name for path in found if path.name not in _IGNORED]
        if present:
            raise UserError(
                f"{folder} is not empty and was not written by tandem "
                f"(found {', '.join(sorted(present)[:5])}). Choose another output folder."
            )
        return Opened("fresh", {})
    try:
        manifest = read_json(path)
        recorded, state = manifest["inputs"], manifest["status"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}). Choose another output folder.") from None
    if manifest["stage"] != stage or recorded != _plain(inputs):
        changes = difference(
            {"stage": manifest["stage"], **recorded}, {"stage": stage, **_plain(inputs)}
        )
        listing = "\n".join(f"  {key}: {old!r} -> {new!r}" for key, old, new in changes)
        raise UserError(
            f"{folder} holds a {state} {manifest['stage']} stage with other inputs "
            f"(there -> now):\n"
            f"{listing}\nUse the same inputs to continue it, or choose another output folder."
        )
    if state == "finished":
        _check_outputs(folder, manifest["outputs"])
        return Opened("finished", manifest["schedule"])
    return Opened("resume", manifest["schedule"])


def start_stage(
    folder: Path, stage: str, inputs: Mapping[str, Any], schedule: Mapping[str, Any]
) -> None:
    """Record that a stage has begun; on a resume, keep when it first did."""
    path = folder / NAME
    started = read_json(path)["started_at"] if path.exists() else _now()
    plain = _plain(inputs)
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
