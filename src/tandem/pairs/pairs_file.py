"""Pairs as files: the orca_dpo_pairs form, in JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tandem.pairs.filters import Pair
from tandem.storage.atomic_files import atomic_file, atomic_write_text

_KEYS = ("system", "question", "chosen", "rejected")


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs in their order, whole or not at all; the suffix says how."""
    rows = [pair.row() for pair in pairs]
    if path.suffix == ".jsonl":
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write_text(path, lines)
        return
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(key, pyarrow.string()) for key in _KEYS])
    with atomic_file(path) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), file)


_DRAWN = ("samples", "temperature", "top_p", "top_k", "max_new_tokens")


def data_card(
    *,
    summary: Mapping[str, Any],
    sources: Mapping[str, Sequence[str]],
    identities: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, Any],
    seed: int,
    versions: Mapping[str, str],
    files: Sequence[str],
) -> str:
    """A README.md with the Hub's YAML header.

    `sources` are names of data sets by use, `identities` what is known of their content, in the
    same order; `settings` the pairs section, `files` the names of the files with pairs.
    """
    asked = _asked("select", settings["select"]) + _asked("filters", settings["filters"])
    asked.append(("keep", settings["keep"]))
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        _header(files),
        "# Preference pairs",
        _about(summary, settings),
        _sources(sources, identities),
        _writer(summary, settings, seed),
        *([_ranking(summary, settings["rank"])] if settings["rank"] is not None else []),
        _counts(summary),
        "## What was asked for\n\n" + _table(("key", "value"), asked),
        _limits(summary),
        f"## Versions\n\n{listed}",
    ]
    return "\n\n".join(parts) + "\n"


def _header(files: Sequence[str]) -> str:
    splits = {"pairs": "train", "heldout": "test"}
    data = [{"split": splits[Path(name).stem], "path": name} for name in files]
    header = {
        "task_categories": ["text-generation"],
        "tags": ["preference", "dpo", "tandem"],
        "configs": [{"config_name": "default", "data_files": data}],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---"


def _about(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if settings["rank"] is not None:
        how = "Both answers were written by one model; the better and the worse one by score"
    else:
        how = "The chosen answer is the instruction set's own, the rejected one was generated"
    heldout = summary.get("heldout")
    also = f", {heldout['kept']} of them held out" if heldout else ""
    total = summary["kept"] + (heldout["kept"] if heldout else 0)
    return (
        f"{total} pairs{also}, in the form of orca_dpo_pairs: `system` (empty for none), "
        f"`question`, `chosen`, `rejected`. {how}. Nobody has read them: that a rejected answer is "
        "worse is an assumption of the recipe, not a finding."
    )


def _sources(
    sources: Mapping[str, Sequence[str]], identities: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    rows = []
    for use, names in sources.items():
        for name, identity in zip(names, identities[use], strict=True):
            known = (
                f"SHA-256 of its files' names and hashes `{identity['files']}`"
                if "files" in identity
                else f"on the Hub, revision {identity.get('revision') or 'not stated'}"
            )
            rows.append((use, f"`{_shown(name)}`", known))
    return "## Data\n\n" + _table(("used for", "data set", "what it was"), rows)


def _writer(summary: Mapping[str, Any], settings: Mapping[str, Any], seed: int) -> str:
    drawn = [(key.replace("_", " "), settings[key]) for key in _DRAWN]
    rows = [*_model_rows(summary["writer"]), *drawn, ("seed", seed)]
    if "round" in summary:
        rows.append(("round", summary["round"]))
    repeatable = (
        "The server's answers cannot be had again; they are recorded in `generated/`."
        if str(summary["writer"]["by"]).startswith("the server")
        else "Each answer has random numbers of its own, from the seed and its number."
    )
    title = "## Generated answers"
    return f"{title}\n\n" + _table(("what", "value"), rows) + f"\n\n{repeatable}"


def _ranking(summary: Mapping[str, Any], rank: Mapping[str, Any]) -> str:
    rows = [*_model_rows(summary["scorer"]), ("least difference", rank["margin"])]
    how = (
        "A number from 1 to 10 for each answer, asked one at a time at temperature 0."
        if rank["judge"] is not None
        else "A reward model's number for each answer."
    )
    return "## Ranking\n\n" + _table(("what", "value"), rows) + f"\n\n{how}"


def _counts(summary: Mapping[str, Any]) -> str:
    parts = ["## Counts"]
    if left_out := summary.get("left_out"):
        parts += ["Prompts left out by the selection:", _table(("reason", "prompts"), left_out)]
    for name, counts in (("Pairs", summary), ("Held out", summary.get("heldout"))):
        if not counts:
            continue
        rows = [
            ("prompts asked", counts["prompts"]),
            ("answers generated", counts["generated"]),
            *((f"passed over: {why}", count) for why, count in counts["dropped"].items()),
            *((f"not answered: {why}", count) for why, count in counts["failed"].items()),
            ("pairs", counts["kept"]),
            *_means(counts),
        ]
        parts += [f"{name}:", _table(("what", "how many"), rows)]
    if reasons := summary["ledger"].get("reasons"):
        parts.append("Records without a pair, each with file and row in `data-ledger.jsonl`:")
        parts.append(_table(("reason", "records"), reasons))
    return "\n\n".join(parts)


def _means(counts: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Rows on the lengths and the scores of answers, on average."""
    rows: list[tuple[str, object]] = []
    for key, what, digits in (("characters", "characters", 0), ("scores", "score", 3)):
        means = counts.get(key, {})
        rows += [
            (f"mean {what}, {whose.replace('_', ' ')}", f"{means[whose]:.{digits}f}")
            for whose in ("answers", "chosen", "rejected")
            if whose in means
        ]
    return rows


def _limits(summary: Mapping[str, Any]) -> str:
    lines = [
        "## Limits",
        "",
        "- Refusals are known by their English openings, languages by script and common words; "
        "both filters miss some and catch some that they should not.",
        "- The licences of the data sets, and the terms of the models that wrote answers, apply.",
    ]
    if "weights" not in summary["writer"]:
        lines.append("- Which weights the server ran under the model's name is not known here.")
    return "\n".join(lines)


def _model_rows(facts: Mapping[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("model", f"`{_shown(facts['model'])}`"), ("by", facts["by"])]
    if "weights" in facts:
        rows.append(("weights, SHA-256", f"`{facts['weights']}`"))
    known = [key for key in ("dtype", "chat_template") if key in facts]
    return rows + [(key.replace("_", " "), facts[key]) for key in known]


def _asked(section: str, values: Mapping[str, Any]) -> list[tuple[str, object]]:
    shown = [(k, v) for k, v in values.items() if v not in (None, [], ()) and v is not False]
    return [(f"{section}.{key}", _plain(value)) for key, value in shown]


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_shown(v["path"]) if isinstance(v, Mapping) else str(v) for v in value)
    return _shown(str(value))


def _table(head: Sequence[str], rows: Mapping[str, Any] | Sequence[Sequence[object]]) -> str:
    listed = rows.items() if isinstance(rows, Mapping) else rows
    lines = [head, ["---"] * len(head), *listed]
    cells = ([" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _shown(name: str) -> str:
    # Paths of the machine that made the pairs are private.
    return Path(name).name if name.startswith(("/", "~")) else name
