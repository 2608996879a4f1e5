"""The report page: one HTML file from a run folder's files, with nothing fetched from elsewhere."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from tandem.report import training_section
from tandem.report.result_rows import compared_rows, result_rows, shown_measures, task_notes
from tandem.report.rounds_section import round_models, rounds_charts, rounds_table
from tandem.report.run_facts import RunFacts, StageFacts, read_run, run_warnings
from tandem.result_warnings import mapping, model_label, model_names, sampling_error
from tandem.storage.atomic_files import atomic_write_text
from tandem.wording import count, duration, is_number, number, percent, short_count

PAGE = "report.html"
_PAIRS_SHOWN = 4


@dataclass(frozen=True)
class _Step:
    """A stage in the strip at the top, and in the chain of hashes at the bottom."""

    name: str
    title: str
    status: str
    time: str = ""
    inputs_hash: str = ""
    outputs: tuple[tuple[str, str], ...] = ()
    inputs: str = ""


def write_report(run_dir: Path) -> Path:
    """Build `report.html` in a run folder (or a single stage's) and return its path.

    It shows what there is, and names what is missing. Raises UserError if the folder has nothing of
    tandem's.
    """
    path = run_dir / PAGE
    atomic_write_text(path, render(read_run(run_dir)))
    return path


@functools.cache
def page_template(name: str = "page.html.jinja") -> Template:
    """A page's template; to compile it takes longer than to fill it in."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup  # only for charts, which escape what they print
    return environment.get_template(name)


def render(facts: RunFacts) -> str:
    """Return the whole page. The template escapes all text from files."""
    models = mapping(facts.evaluation.get("models")).values()
    models_of_rounds = round_models(facts)
    with_errors = any(mapping(model).get("errors") for model in models)
    return page_template().render(
        facts=facts,
        base_model=facts.base_model,
        description=str(facts.recipe.get("description") or ""),
        findings=run_warnings(facts),
        steps=_steps(facts),
        measures=shown_measures(facts.evaluation),
        rows=result_rows(facts.evaluation),
        result_note=_result_note(facts.evaluation),
        compared=compared_rows(facts.evaluation, "previous") if with_errors else [],
        compared_names=[model_label(n) for n in model_names(facts.evaluation)],
        task_notes=task_notes(facts.evaluation),
        rounds=rounds_table(models_of_rounds),
        round_charts=rounds_charts(models_of_rounds),
        sections=[_section(s) for s in facts.stages if s.kind in ("sft", "pairs", "dpo")],
        others=[(s.title, s.name, _flat(s.summary)) for s in facts.stages if s.kind == "merge"],
        samples=_samples(facts.evaluation),
        versions=_versions(facts),
    )


def _section(stage: StageFacts) -> dict[str, Any]:
    head = {"kind": stage.kind, "name": stage.name, "title": stage.title}
    if stage.kind == "pairs":
        return head | _pairs(stage)
    return head | {
        "tiles": training_section.tiles(stage),
        "curves": training_section.curves(stage),
        "smoothing": training_section.smoothing_note(stage),
        "lengths": training_section.lengths(stage),
        "savings": training_section.savings(stage),
        "ledger": training_section.ledger_counts(stage),
        "reasons": training_section.ledger_reasons(stage),
        "ledger_lines": stage.ledger,
        "answered": training_section.answered_prompts(stage),
    }


def _steps(facts: RunFacts) -> list[_Step]:
    steps = {one.folder: _Step(one.folder, one.title, "missing") for one in facts.missing}
    for stage in facts.stages:
        manifest = stage.manifest
        steps[stage.name] = _Step(
            stage.name,
            stage.title,
            stage.status,
            _took(manifest.get("started_at"), manifest.get("finished_at")),
            str(manifest.get("inputs_hash") or ""),
            tuple((str(k), str(v)) for k, v in mapping(manifest.get("outputs")).items()),
            json.dumps(manifest.get("inputs", {}), indent=2, ensure_ascii=False),
        )
    order = sorted(facts.missing + facts.known, key=lambda one: one.place)
    return [steps[one.folder] for one in order] or list(steps.values())


def _took(start: object, end: object) -> str:
    try:
        span = datetime.fromisoformat(str(end)) - datetime.fromisoformat(str(start))
    except (ValueError, TypeError):
        return ""
    # Manifests record whole seconds.
    return duration(span.total_seconds()) if span.total_seconds() >= 1 else "< 1 s"


def _result_note(evaluation: Mapping[str, Any]) -> str:
    counts = mapping(evaluation.get("counts"))
    questions, pairs = counts.get("questions"), counts.get("pairs")
    if not (is_number(questions) or is_number(pairs)):
        return ""
    note = f"Measured on {count(questions)} held-out questions and {count(pairs)} held-out pairs."
    shares = [mapping(m).get("answer_accuracy") for m in mapping(evaluation.get("models")).values()]
    known = [share for share in shares if is_number(share)]
    if not known or not is_number(questions) or not questions:
        return note
    error = max(sampling_error(share, int(questions)) for share in known)
    return (
        f"{note} The standard error of an answer accuracy is at most {100 * error:.1f} points: "
        "changes of that size are noise."
    )


def _pairs(stage: StageFacts) -> dict[str, Any]:
    s = stage.summary
    figures = [(k, count(s[k])) for k in ("prompts", "generated", "kept") if is_number(s.get(k))]
    heldout = mapping(s.get("heldout")).get("kept")
    if is_number(heldout):
        figures.append(("kept for evaluation", count(heldout)))
    for key, title, show in (
        ("characters", "mean answer", lambda value: f"{value:.0f} characters"),
        ("scores", "mean score", lambda value: number(value, 3)),
    ):
        if is_number(mean := mapping(s.get(key)).get("answers")):
            figures.append((title, show(mean)))
    if is_number(s.get("seconds")):
        figures.append(("time", duration(s["seconds"])))
    dropped = [
        (f"{before}{k}", count(n))
        for key, before in (("dropped", ""), ("failed", "not answered: "))
        for k, n in mapping(s.get(key)).items()
        if is_number(n)
    ]
    left_out = [(str(k), count(n)) for k, n in mapping(s.get("left_out")).items() if is_number(n)]
    return {
        "tiles": figures,
        "dropped": dropped,
        "left_out": left_out,
        "examples": [
            {k: str(e.get(k) or "") for k in ("system", "question", "chosen", "rejected")}
            for e in _first_pairs(stage.folder)
        ],
    }


def _first_pairs(folder: Path) -> list[Mapping[str, Any]]:
    """Return the first pairs of a stage, whatever their file's kind."""
    parquet, path = folder / "pairs.parquet", folder / "pairs.jsonl"
    if parquet.is_file():
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(parquet) as file:
            first = next(file.iter_batches(batch_size=_PAIRS_SHOWN), None)
        return [mapping(row) for row in first.to_pylist()] if first is not None else []
    examples: list[Mapping[str, Any]] = []
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            for line, _ in zip(file, range(_PAIRS_SHOWN), strict=False):
                try:
                    examples.append(mapping(json.loads(line)))
                except (ValueError, RecursionError):
                    break  # a file still being written
    return examples


def _samples(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    raw = evaluation.get("samples")
    samples = []
    for sample in raw if isinstance(raw, list) else []:
        answers = mapping(mapping(sample).get("answers"))
        names = [n for n in model_names(evaluation) if n in answers]
        names += [n for n in answers if n not in names]
        samples.append(
            {
                "prompt": str(sample.get("prompt", "")),
                "expected": str(sample.get("expected") or ""),
                "answers": [(n, model_label(n), str(answers[n])) for n in names],
            }
        )
    return samples


def _versions(facts: RunFacts) -> list[tuple[str, str]]:
    """Return each package once, with all its versions in the stages."""
    versions: dict[str, dict[str, None]] = {}
    for manifest in [facts.manifest, *(s.manifest for s in facts.stages)]:
        for package, version in mapping(manifest.get("versions")).items():
            versions.setdefault(str(package), {})[str(version)] = None
    return [(package, ", ".join(each)) for package, each in versions.items()]


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, inner in value.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(inner, Mapping):
            rows += _flat(inner, f"{name}: ")
        elif key.endswith("seconds") and is_number(inner):
            rows.append((name.removesuffix(" seconds"), duration(inner)))
        elif isinstance(inner, float):
            share = key.endswith(("accuracy", "rate"))
            rows.append((name, percent(inner) if share else f"{inner:.6g}"))
        elif isinstance(inner, int) and not isinstance(inner, bool):
            rows.append((name, short_count(inner)))
        elif not isinstance(inner, list):
            rows.append((name, str(inner)))
    return rows
