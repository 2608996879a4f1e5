"""The corruption table: each kind of file that is read back, times each kind of damage.

`python -m tests.faults.corruption` builds a finished run and an interrupted stage of each kind in
a temporary folder, damages one file at a time, starts the command that reads it, and says what
came of it. It fails unless every damage is refused by name, computed again, or does not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.cli.main import main as tandem
from tandem.storage import hashing

from ..stages.made_inputs import make_conversations, make_model_folder, make_pairs

# What a damaged file may lead to. `named` is said to the user, and the results are the same.
SOUND = ("refused", "named", "not read")
UNSOUND = ("traceback", "believed", "unnamed")

Result = dict[str, str]


def _at(share: float) -> Callable[[bytes], bytes]:
    """Flips one bit at a share of the file."""

    def flip(content: bytes) -> bytes:
        place = min(int(len(content) * share), len(content) - 1)
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]

    return flip


def _json(change: Callable[[Any], Any]) -> Callable[[bytes], bytes | None]:
    """Changes the JSON value in a file, or in the last line but one of a file of lines."""

    def changed(content: bytes) -> bytes | None:
        try:
            return json.dumps(change(json.loads(content)), indent=2).encode()
        except ValueError:
            pass
        lines = content.split(b"\n")
        place = max(0, len(lines) - 3)
        try:
            lines[place] = json.dumps(change(json.loads(lines[place]))).encode()
        except ValueError:
            return None  # no JSON
        return b"\n".join(lines)

    return changed


def _numbers(to: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Puts other whole numbers in the place of all that a value holds."""

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: change(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [change(inner) for inner in value]
        return to(value) if isinstance(value, int) and not isinstance(value, bool) else value

    return change


def _texts(value: Any) -> Any:
    """Another plausible text in the place of the longest one."""
    texts: list[str] = []

    def collect(one: Any) -> None:
        if isinstance(one, str):
            texts.append(one)
        for inner in (
            one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        ):
            collect(inner)

    collect(value)
    longest = max(texts, key=len, default="")

    def change(one: Any) -> Any:
        if isinstance(one, dict):
            return {key: change(inner) for key, inner in one.items()}
        if isinstance(one, list):
            return [change(inner) for inner in one]
        return one[::-1] + "0" if one == longest and longest else one

    return change(value)


def _without(place: int) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        if isinstance(value, dict) and value:
            gone = list(value)[place]
            return {key: inner for key, inner in value.items() if key != gone}
        return value[:-1] if isinstance(value, list) else value

    return change


def _other_type(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: [1] if isinstance(inner, dict) else {"a": 1} for key, inner in value.items()}
    return {"a": value}


CHANGES: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda _: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "bit at the start": _at(0.02),
    "bit in the middle": _at(0.5),
    "bit near the end": _at(0.93),
    "zeros": lambda content: bytes(len(content)),
    "zeros within": lambda content: (
        content[: len(content) // 3] + bytes(40) + content[len(content) // 3 + 40 :]
    ),
    "no UTF-8": lambda content: (
        content[: len(content) // 2] + b"\xff\xfe" + content[len(content) // 2 :]
    ),
    "text behind": lambda content: content + b"<<<<<<< HEAD\n",
    "a list": lambda _: b"[1, 2]\n",
    "a number": lambda _: b"5\n",
    "a text": lambda _: b'"text"\n',
    "null": lambda _: b"null\n",
    "first key gone": _json(_without(0)),
    "last key gone": _json(_without(-1)),
    "other types": _json(_other_type),
    "counts 0": _json(_numbers(lambda _: 0)),
    "counts -1": _json(_numbers(lambda _: -1)),
    "counts 1e9": _json(_numbers(lambda _: 10**9)),
    "counts + 1": _json(_numbers(lambda value: value + 1)),
    "another text": _json(_texts),
}
"""What becomes of a file's content, by the name of the damage; None where it cannot be done."""

PLACES = ("missing", "a folder", "a link to itself", "another run's")
"""Damage that is more than another content."""

DAMAGES = (*PLACES, *CHANGES)


@dataclass(frozen=True)
class Scene:
    """A folder in which a command reads back what another has written.

    Attributes:
        name: of the state.
        home: where it lies, untouched.
        command: what is started.
        files: that it may read, by paths within `home`.
        results: files that it ends with.
        other: a home whose files of the same names are another run's.
    """

    name: str
    home: Path
    command: tuple[str, ...]
    files: tuple[str, ...]
    results: tuple[str, ...]
    other: Path


@dataclass(frozen=True)
class Outcome:
    """What a command led to: exit code, what it said, and its results by their hashes."""

    code: int
    said: str
    results: Result


def run(scene: Scene, desk: Path, damage: Callable[[Path], bool]) -> Outcome | None:
    """Start a scene's command on a copy with some damage; None where that cannot be done."""
    shutil.rmtree(desk, ignore_errors=True)
    shutil.copytree(scene.home, desk, symlinks=True)
    if not damage(desk):
        return None
    hashing._hash_file.cache_clear()
    before = Path.cwd()
    os.chdir(desk)
    os.environ["XDG_CACHE_HOME"] = str(desk / "cache")
    try:
        code, said = called(scene.command)
    finally:
        os.chdir(before)
    results = {name: _digest(desk, name) for name in scene.results}
    page = desk / "run" / "report.html"
    if scene.command[0] == "report" and page.is_file():
        said += page.read_text(errors="replace")
    return Outcome(code, said, results)


def called(argv: Sequence[str]) -> tuple[int, str]:
    """A command's exit code and all that it said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        sys.stdin, kept = io.StringIO("say red\n"), sys.stdin
        try:
            code = tandem(argv)
        finally:
            sys.stdin = kept
    return code, said.getvalue()


def judged(scene: Scene, sound: Outcome, file: str, damaged: Outcome) -> str:
    """The verdict on what a damaged file led to."""
    if damaged.code == 1 or "Traceback (most" in damaged.said:
        return "traceback"
    name = Path(file).name
    # A page of a run names its files anyway.
    names = damaged.said.count(name) > sound.said.count(name)
    # A refusal may name the stage's or the checkpoint's folder instead.
    names |= str(Path(file).parent) in damaged.said.partition("error: ")[2]
    step = Path(file).parent.name
    names |= step.startswith("step-") and f"{step} is skipped" in damaged.said
    if damaged.code:
        return "refused" if names else "unnamed"
    if damaged.results == sound.results:
        return "named" if names else "not read"
    return "named" if names else "believed"


def spoil(scene: Scene, file: str, damage: str) -> Callable[[Path], bool]:
    """What damages a file of a copy of a scene."""

    def act(desk: Path) -> bool:
        path = desk / file
        if damage in CHANGES:
            content = path.read_bytes()
            changed = CHANGES[damage](content) if content else None
            if changed is None or changed == content:
                return False
            path.write_bytes(changed)
            return True
        other = scene.other / file
        if damage == "another run's" and (
            not other.is_file() or other.read_bytes() == path.read_bytes()
        ):
            return False
        path.unlink()
        if damage == "a folder":
            (path / "inner").mkdir(parents=True)
        elif damage == "a link to itself":
            path.symlink_to(path.name)
        elif damage == "another run's":
            shutil.copyfile(other, path)
        return True

    return act


# How long something took, when it was and where it lay are no results.
_UNSTEADY = {"seconds", "memory", "tokens_per_second", "path", "at", "estimate", "dtype_seconds"}


def _digest(desk: Path, name: str) -> str:
    path = desk / name
    if not path.is_file():
        return "missing"
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl"):
        try:
            values = (
                [json.loads(line) for line in content.splitlines()]
                if path.suffix == ".jsonl"
                else json.loads(content)
            )
            content = json.dumps(_steady(values), sort_keys=True).encode()
        except ValueError:
            pass
    return hashlib.sha256(content).hexdigest()


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _steady(inner)
            for key, inner in value.items()
            if not any(part in key for part in _UNSTEADY)
        }
    return [_steady(one) for one in value] if isinstance(value, list) else value


_STAGE = ("--max_steps", "2", "--batch_size", "8", "--max_length", "200",
          "--max_prompt_length", "150")  # fmt: skip
_TRAINED = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "tokenizer.json",
    "metrics.jsonl",
    "validation.jsonl",
)
_SFT = ("run", "recipe.yaml", "output_dir=out", "--until", "sft")
_DPO = ("run", "dpo.yaml")
_PAIRS = ("pairs", "--model", "model", "--prompts", "conversations.jsonl", "--output_dir", "out",
          "samples=4", "max_new_tokens=6")  # fmt: skip
_EVAL = ("eval", "model", "--questions", "questions.jsonl", "--heldout", "heldout.jsonl",
         "--pairs", "pairs.jsonl", "--max_new_tokens", "6", "--output_dir", "out")  # fmt: skip
_MERGED = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def make_home(home: Path) -> Path:
    """A folder with a tiny model and small data, and a recipe with every stage."""
    home.mkdir(parents=True)
    make_model_folder(home / "model")
    make_conversations(home / "conversations.jsonl")
    make_conversations(home / "heldout.jsonl", 6)
    make_pairs(home / "pairs.jsonl")
    question = {"question": "say red", "answer": "red", "completion": "red green"}
    (home / "questions.jsonl").write_text(json.dumps(question) + "\n")
    stage = {
        "batch_size": 8,
        "max_length": 200,
        "max_steps": 4,
        "save_steps": 1,
        "logging_steps": 1,
        "validation": {"fraction": 0.25, "steps": 1},
        "keep": "best",
    }
    recipe = {
        "name": "corrupted",
        "model": "model",
        "output_dir": "run",
        "sft": {"data": "conversations.jsonl", **stage},
        "pairs": {
            "prompts": "conversations.jsonl",
            "heldout": "heldout.jsonl",
            "max_new_tokens": 6,
            "keep": "different",
        },
        "dpo": {"learning_rate": 1e-3, **stage},
        "evaluate": {"questions": "questions.jsonl", "max_new_tokens": 6, "samples": 2},
    }
    (home / "recipe.yaml").write_text(json.dumps(recipe))
    alone = {"name": "aligned", "model": "model", "output_dir": "out",
             "dpo": {"data": "pairs.jsonl", "learning_rate": 1e-3, **stage}}  # fmt: skip
    (home / "dpo.yaml").write_text(json.dumps(alone))
    return home


@contextlib.contextmanager
def interrupted(target: Any, name: str, after: int) -> Iterator[None]:
    """Let the keyboard stop a command once a function has been called so often."""
    whole, calls = getattr(target, name), 0

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        found = whole(*args, **named) if after else None
        if calls >= after:
            raise KeyboardInterrupt
        return found

    setattr(target, name, counted)
    try:
        yield
    finally:
        setattr(target, name, whole)


def began(base: Path, home: Path, command: Sequence[str], code: int, *changes: str) -> Path:
    """A copy of a home in which a command has been started, and ended with some exit code."""
    shutil.copytree(base, home)
    before = Path.cwd()
    os.chdir(home)
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    try:
        found, said = called((*command, *changes))
    finally:
        os.chdir(before)
    assert found == code, said
    return home


def read_by(home: Path, *folders: str) -> tuple[str, ...]:
    """The files of some folders of a home, locks and databases' own apart."""
    found = [path for folder in folders for path in sorted((home / folder).rglob("*"))]
    return tuple(str(path.relative_to(home)) for path in found if path.is_file())


def interrupted_scenes(root: Path, base: Path, *, others: bool = True) -> list[Scene]:
    """An interrupted stage of each kind, which the same command goes on with."""
    from tandem.evaluate.evaluate_models import Evaluator
    from tandem.storage.journal import Journal
    from tandem.train.checkpoint import CheckpointStore

    scenes = []

    def add(name: str, command: tuple[str, ...], target: Any, function: str, after: int,
            results: Sequence[str], *more: str) -> None:  # fmt: skip
        homes = []
        for label, changes in (("", ()), ("-other", ("seed=9",)))[: 1 + others]:
            with interrupted(target, function, after):
                if changes and command[0] != "run":
                    changes = ("--limit", "4") if command[0] == "eval" else ("--seed", "9")
                homes.append(began(base, root / (name + label), command, 3, *changes))
        files = read_by(homes[0], "out", "cache", *more)
        scenes.append(
            Scene(name, homes[0], command, files, tuple(f"out/{one}" for one in results), homes[-1])
        )

    add("killed sft", _SFT, CheckpointStore, "save", 6, [f"1-sft/{one}" for one in _TRAINED])
    add("killed dpo", _DPO, CheckpointStore, "save", 6, [f"4-dpo/{one}" for one in _TRAINED])
    add("killed pairs", _PAIRS, Journal, "add", 2, ("pairs.jsonl",))
    add("killed evaluate", _EVAL, Evaluator, "_summary", 0, ("evaluation.json",))
    return scenes


def finished_scenes(root: Path, base: Path, *, others: bool = True) -> list[Scene]:
    """A finished run, and the commands that read it; without `others` none has another run's."""
    whole = began(base, root / "whole", ("run", "recipe.yaml"), 0)
    other = whole
    if others:
        changes = ("seed=9", "sft.max_steps=3")
        other = began(base, root / "whole-other", ("run", "recipe.yaml"), 0, *changes)
    weights = tuple(
        f"run/{name}"
        for name in ("1-sft/adapter_model.safetensors", "2-sft-merged/model.safetensors",
                     "3-pairs/pairs.jsonl", "4-dpo/adapter_model.safetensors",
                     "5-final/model.safetensors", "6-evaluation/evaluation.json")
    )  # fmt: skip
    half = root / "half"
    shutil.copytree(whole, half)
    for folder in ("4-dpo", "5-final", "6-evaluation"):
        shutil.rmtree(half / "run" / folder)
    return [
        Scene("run again", whole, ("run", "recipe.yaml"), read_by(whole, "run"), weights, other),
        Scene("run --from dpo", half, ("run", "recipe.yaml", "--from", "dpo", "--until", "dpo"),
              read_by(half, "run"), ("run/4-dpo/adapter_model.safetensors",), other),
        Scene("merge", whole, ("merge", "--base-model-path", "model", "--lora-model-path",
                               "run/1-sft", "--output-path", "out"),
              read_by(whole, "run/1-sft"), tuple(f"out/{one}" for one in _MERGED), other),
        Scene("dpo of the merged", half, ("dpo", "--model_name_or_path", "run/2-sft-merged",
              "--dataset_name", "pairs.jsonl", "--output_dir", "out", *_STAGE),
              read_by(half, "run/2-sft-merged"), ("out/adapter_model.safetensors",), other),
        Scene("eval of the final", whole, ("eval", "run/5-final", *_EVAL[2:]),
              read_by(whole, "run/5-final"), ("out/evaluation.json",), other),
        Scene("eval of an adapter", whole, ("eval", "run/1-sft", *_EVAL[2:]),
              read_by(whole, "run/1-sft"), ("out/evaluation.json",), other),
        Scene("chat", whole, ("chat", "run/5-final", "--max_new_tokens", "8"),
              read_by(whole, "run/5-final"), (), other),
        Scene("chat with an adapter", whole, ("chat", "run/1-sft", "--max_new_tokens", "8"),
              read_by(whole, "run/1-sft"), (), other),
        Scene("report", whole, ("report", "run"), read_by(whole, "run"),
              ("run/report.html",), other),
        Scene("plan", whole, ("plan", "recipe.yaml"), read_by(whole, "run", "cache"), (), other),
    ]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A damaged file, and what came of it."""

    scene: str
    file: str
    damage: str
    verdict: str
    said: str


def cases(scene: Scene, desk: Path, pairs: Sequence[tuple[str, str]]) -> Iterator[Case]:
    """Damage files of a scene, one at a time.

    Args:
        scene: the state and the command.
        desk: where copies are made.
        pairs: of a file and a damage.
    """
    sound = run(scene, desk, lambda _: True)
    assert sound is not None
    assert sound.code == 0, sound.said
    for file, damage in pairs:
        try:
            outcome = run(scene, desk, spoil(scene, file, damage))
        except Exception as error:  # what a command lets through is what is looked for
            yield Case(scene.name, file, damage, "traceback", repr(error))
            continue
        if outcome is not None:
            yield Case(scene.name, file, damage, judged(scene, sound, file, outcome), outcome.said)


def main(argv: Sequence[str]) -> int:
    """Print the table; returns 1 when a verdict is not sound."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.corruption", description=__doc__)
    parser.add_argument("--scene", default="", help="only scenes whose names begin so")
    parser.add_argument("--file", default="", help="only files whose paths hold this")
    parser.add_argument("--damage", default="", help="only this damage")
    parser.add_argument("--every", type=int, default=1, help="only every Nth case")
    parser.add_argument("--said", action="store_true", help="print what was said of unsound ones")
    asked = parser.parse_args(argv)
    table: Counter[tuple[str, str]] = Counter()
    unsound = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = make_home(root / "base")
        scenes = [*interrupted_scenes(root, base), *finished_scenes(root, base)]
        for scene in scenes:
            if not scene.name.startswith(asked.scene):
                continue
            pairs = [
                (file, damage)
                for file in scene.files
                for damage in DAMAGES
                if asked.file in file and asked.damage in ("", damage)
            ]
            counts: Counter[str] = Counter()
            for case in cases(scene, root / "desk", pairs[:: asked.every]):
                counts[case.verdict] += 1
                table[case.damage, case.verdict] += 1
                if case.verdict in UNSOUND:
                    unsound.append(case)
                    print(f"  {case.verdict}: {scene.name}, {case.file}, {case.damage}", flush=True)
                    if asked.said:
                        print(case.said[-1200:])
            print(f"{scene.name}: {dict(counts)}", flush=True)
    width = max(map(len, DAMAGES))
    print(f"\n{'damage':<{width}}  " + "  ".join(f"{one:>9}" for one in SOUND + UNSOUND))
    for damage in DAMAGES:
        row = "  ".join(f"{table[damage, one]:>9}" for one in SOUND + UNSOUND)
        print(f"{damage:<{width}}  {row}")
    print(f"\n{sum(table.values())} corruptions, " + ", ".join(
        f"{sum(n for (_, one), n in table.items() if one == verdict)} {verdict}"
        for verdict in SOUND + UNSOUND
    ))  # fmt: skip
    return 1 if unsound else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
