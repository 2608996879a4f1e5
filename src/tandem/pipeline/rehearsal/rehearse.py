"""A whole run, rehearsed on the CPU: what would fail after a day fails within minutes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter

from rich.console import Console

from tandem.integrations.choose import choose_device
from tandem.pipeline.rehearsal.findings import Notebook, Rehearsal
from tandem.pipeline.rehearsal.looks import Looks
from tandem.pipeline.rehearsal.run_stages import run_stages, try_export, write_page
from tandem.pipeline.rehearsal.sample_data import Sampler
from tandem.pipeline.rehearsal.shortened import Shortening, shortened
from tandem.recipe.recipe import Recipe, stages_of

# What no rehearsal can show.
_NEVER = (
    "memory and speed (`tandem plan` estimates them)",
    "quality: the model is random",
    "the real weights, and that their files are whole",
    "rows that are not in the sample (`tandem check --recipe` reads all)",
    "the device's kernels and number formats",
)


@dataclass(frozen=True)
class Scope:
    """How much is rehearsed."""

    records: int = 48  # of each data set
    steps: int = 4  # of each training stage
    with_servers: bool = True  # whether servers and judges are asked
    keep: bool = False  # whether the files stay
    export: bool = True  # whether the last model becomes a GGUF file


def rehearse(recipe: Recipe, scope: Scope, console: Console) -> Rehearsal:
    """Rehearse a recipe in a folder of its own; nothing of the run itself is written.

    Configuration and tokenizer of its models are fetched where they are on the Hub, no weights;
    data sets are fetched whole, as the run will. Mistakes are findings, and only bugs are raised.
    """
    began = perf_counter()
    choose_device("cpu", "auto")  # before a library looks for devices itself
    folder = Path(mkdtemp(prefix="tandem-rehearsal-"))
    sampler = Sampler(folder / "data", scope.records, recipe.seed)
    names: dict[str, str] = {}

    def translated(text: str) -> str:
        text = sampler.translated(text)
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        return text

    notebook = Notebook(console, translated)
    looks = Looks(recipe, folder, sampler, notebook, scope.steps, scope.with_servers)
    looks.all()
    names |= {str(path): _named(recipe, key) for key, path in looks.models.items()}
    run = folder / "run"
    names[str(run)] = recipe.output_dir
    short = Shortening({})
    skipped: list[str] = [stage.name for stage in stages_of(recipe)]
    if not notebook.failed:
        made, short = shortened(recipe, looks.inputs(run), scope.steps)
        skipped = run_stages(made, notebook, console)
        if not notebook.failed:
            write_page(made, notebook)
            if scope.export:
                try_export(made, notebook, console)
    kept = scope.keep or notebook.failed
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
    return Rehearsal(
        tuple(notebook.findings), tuple(skipped), tuple(short.changes),
        (*_NEVER, *short.not_shown, *notebook.not_shown), tuple(notebook.notes),
        perf_counter() - began, folder if kept else None,
    )  # fmt: skip


def _named(recipe: Recipe, key: str) -> str:
    """What the recipe says under a dotted key."""
    found: object = recipe
    for part in key.split("."):
        found = getattr(found, part, None)
    return str(found)
