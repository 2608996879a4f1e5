"""How soon a command says something, and how soon it ends: `python -m benchmarks.first_contact`.

Each command runs in a process of its own. Measured are CPU seconds, of all threads: until the
first output, until the process has ended, and from the last output to the end. They are also given
as ratios to those of `import torch`, which takes its turn in each round; so a slow or busy machine
changes little. Everything is on the embedded demo model, and all compiled files are there.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from .apart import ROOT, SideError
from .record import Environment, log
from .tables import RESULTS

COMMAND = "python -m benchmarks.first_contact"
_YARDSTICK = "import torch; print()"
_TICKS = os.sysconf("SC_CLK_TCK")
_RECIPE = """\
name: contact
model: demo:base
output_dir: run
chat_template: neural-chat
sft:
  data: data.jsonl
  max_length: 128
  max_steps: 1
  batch_size: 2
"""
# Where `import torch` takes 2.6 CPU seconds: the first line within 0.5 s, a mistake, or that there
# is nothing to do, within 1 s, a record shown within 1.5 s, an end within 0.3 s.
_TORCH = 2.6
_FIRST, _MISTAKE, _SHOWN, _END = 0.5, 1.0, 1.5, 0.3


@dataclass(frozen=True)
class Case:
    """A command line, what it is called, its exit code, and words of its output.

    `first` and `limit` are for the seconds until its first output and until its end, None where
    weights are loaded before.
    """

    name: str
    argv: tuple[str, ...]
    code: int
    words: str
    first: float = _FIRST
    limit: float | None = _MISTAKE


_SHOW = ("data.jsonl", "--model", "demo:base", "--chat_template", "neural-chat")
_MERGE = ("--base-model-path", "demo:base", "--lora-model-path", "none", "--output-path", "out")
_DONE, _LONG = "nothing to do", "sft.max_length 9999 exceeds the context"
CASES = (
    Case("run, one SFT step and a merge", ("run", "contact.yaml", "output_dir=fresh"), 0,
         "merge: 28 weights", limit=None),
    Case("run, finished before", ("run", "contact.yaml"), 0, _DONE),
    Case("run, data that is not there", ("run", "contact.yaml", "sft.data=none.jsonl"), 2,
         "no file or folder none.jsonl"),
    Case("run, beyond the model's context", ("run", "contact.yaml", "sft.max_length=9999"), 2,
         _LONG),
    Case("run of the demo, beyond its context", ("run", "demo", "sft.max_length=9999"), 2, _LONG),
    Case("plan, data that is not there", ("plan", "contact.yaml", "sft.data=none.jsonl"), 2,
         "no file or folder none.jsonl"),
    Case("merge, no adapter", ("merge", *_MERGE), 2, "none is no adapter folder"),
    # What is wrong here is the first output.
    Case("run, a wrong key", ("run", "contact.yaml", "sft.max_lenght=9"), 2, "did you mean",
         _MISTAKE),
    Case("run, a wrong stage", ("run", "contact.yaml", "--until", "sfft"), 2, "stages are",
         _MISTAKE),
    Case("plan of a file that is not there", ("plan", "none.yaml"), 2, "no such file", _MISTAKE),
    Case("show, one record", ("show", *_SHOW, "--row", "1"), 0, "trained |", _SHOWN, _SHOWN),
    Case("check --model, 20 records", ("check", *_SHOW), 0, "20 records read", _SHOWN, _SHOWN),
    Case("the help text", ("--help",), 0, "usage: tandem", limit=_FIRST),
)  # fmt: skip


@dataclass(frozen=True)
class Contact:
    """CPU seconds of a process: until its first output, of all, and after its last output."""

    first: float
    whole: float
    after: float


def main(arguments: Sequence[str] | None = None) -> str:
    """Measure, print the page, and return it."""
    options = _parse(arguments)
    chosen = [case for case in CASES if not options.only or case.name in options.only]
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        scratch = Path(name)
        _write_inputs(scratch)
        if any(case.argv == ("run", "contact.yaml") for case in chosen):
            measure(replace(CASES[1], words=""), scratch)  # trains; is finished from then on
        torch: list[float] = []
        contacts: dict[str, list[Contact]] = {case.name: [] for case in chosen}
        for repeat in range(options.repeats + 1):
            seconds = _run(["-c", _YARDSTICK], 0, "", scratch).whole
            # In the first round compiled files are written, and read into memory.
            torch += [seconds] if repeat else []
            for case in chosen:
                contact = measure(case, scratch)
                contacts[case.name] += [contact] if repeat else []
            log(f"{repeat}/{options.repeats}: import torch {seconds:.2f} s")
    page = _page(chosen, contacts, torch, options)
    print(page, flush=True)
    if options.save:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "first-contact.md").write_text(page, encoding="utf-8")
    return page


def _write_inputs(scratch: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": f"Say the number {n}.", "output": f"It is {n}."} for n in range(20)
    ]
    (scratch / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (scratch / "contact.yaml").write_text(_RECIPE)


def measure(case: Case, scratch: Path) -> Contact:
    """Run a case once; raises SideError for another exit code or output than its own."""
    argv = [word.replace("=fresh", f"={tempfile.mkdtemp(dir=scratch)}/run") for word in case.argv]
    return _run(["-m", "tandem", *argv], case.code, case.words, scratch)


def _run(argv: Sequence[str], code: int, words: str, folder: Path) -> Contact:
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"},
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    process = subprocess.Popen(
        [sys.executable, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    moments: list[float] = []
    said = b""
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                part = os.read(key.fd, 2**16)
                if part:
                    moments.append(cpu_seconds(process.pid))
                    said += part
                else:
                    selector.unregister(key.fileobj)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    for stream in (process.stdout, process.stderr):
        stream.close()
    if process.returncode != code or words not in said.decode():
        raise SideError(f"{' '.join(argv)}: exit code {process.returncode}\n{said.decode()}")
    whole = usage.ru_utime + usage.ru_stime
    return Contact(moments[0], whole, max(0.0, whole - moments[-1]))


def cpu_seconds(pid: int) -> float:
    """CPU seconds that a process has used, all its threads together."""
    # Behind the program's name, which may have blanks in it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _page(
    cases: Sequence[Case],
    contacts: dict[str, list[Contact]],
    torch: Sequence[float],
    options: argparse.Namespace,
) -> str:
    environment = Environment.here(1, "cpu")

    def cell(name: str, part: str, limit: float | None) -> str:
        seconds = [getattr(contact, part) for contact in contacts[name]]
        ratio = median(one / whole for one, whole in zip(seconds, torch, strict=True))
        mark = "" if limit is None or ratio <= limit / _TORCH else " **over**"
        return f"{median(seconds):.2f} s, {ratio:.2f}{mark}"

    limits = ", ".join(
        f"{what} {seconds / _TORCH:.2f} ({seconds} s)"
        for what, seconds in (
            ("first output", _FIRST), ("a mistake, or nothing to do,", _MISTAKE),
            ("a record, or a data set checked,", _SHOWN), ("the end", _END),
        )
    )  # fmt: skip
    lines = [
        "# First contact: how soon commands speak, and how soon they end",
        "",
        f"CPU seconds, and their ratio to those of `import torch` in the same round "
        f"({median(torch):.2f} s, {min(torch):.2f} to {max(torch):.2f}); medians of "
        f"{options.repeats} rounds. `{COMMAND} --repeats {options.repeats}`. "
        f"{environment.processor}, 1 thread; {environment.versions}.",
        "",
        f"Limits of the ratio, and what they are where `import torch` takes {_TORCH} s: {limits}.",
        "",
        "| command | until the first output | until it ended | after the last output |",
        "|---|---|---|---|",
        *(
            f"| {case.name} | {cell(case.name, 'first', case.first)} "
            f"| {cell(case.name, 'whole', case.limit)} | {cell(case.name, 'after', _END)} |"
            for case in cases
        ),
    ]
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--repeats", type=int, default=5)
    add("--only", nargs="+", metavar="NAME", help="only the commands of these names")
    add("--results", type=Path, default=RESULTS)
    add("--save", action="store_true", help="also write the page to --results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
