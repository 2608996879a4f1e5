"""The model card of the final folder: README.md, made from the run's files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tandem.losses.known import known_losses
from tandem.report import result_rows
from tandem.report.run_facts import (
    RunFacts,
    StageFacts,
    find_key,
    loss_names,
    read_run,
    run_warnings,
)
from tandem.result_warnings import mapping, model_label, model_names
from tandem.storage.atomic_files import atomic_write_text
from tandem.wording import count, is_number

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DIGEST = re.compile(r"[0-9a-f]{64}")
# The settings of a training stage that a card lists, in this order.
_SETTINGS = (
    "batch_size", "epochs", "max_steps", "optimizer", "learning_rate", "lr_scheduler",
    "min_lr_ratio", "decay_ratio", "lr_power", "warmup_steps", "warmup_ratio", "weight_decay",
    "neftune_alpha", "ema_decay", "full", "loss", "beta", "max_length", "max_prompt_length",
    "too_long", "loss_on", "lora",
)  # fmt: skip


def write_card(run_dir: Path, model_dir: Path) -> Path:
    """Write README.md into `model_dir` and return its path; raise UserError without a run."""
    path = model_dir / "README.md"
    atomic_write_text(path, model_card(card_facts(read_run(run_dir))))
    return path


def card_facts(run: RunFacts) -> dict[str, Any]:
    """Return the plain values that `model_card` prints, from a run's files."""
    versions: dict[str, str] = {}
    for stage in run.stages:
        versions |= {str(k): str(v) for k, v in mapping(stage.manifest.get("versions")).items()}
    return {
        "name": run.name,
        "description": str(run.recipe.get("description") or ""),
        "base_model": _shown_path(run.base_model),
        "chat_template": str(run.recipe.get("chat_template") or ""),
        "seed": run.recipe.get("seed"),
        "stages": [_stage(run, s) for s in run.trained],
        "evaluation": run.evaluation,
        "warnings": [one.line for one in run_warnings(run) if one.level == "warning"],
        "versions": versions,
    }


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the card as Markdown with the Hub's YAML header; `facts` are `card_facts`."""
    parts = [_header(facts), f"# {_line(facts['name'])}"]
    if facts.get("description"):
        parts.append(_line(facts["description"]))
    base = facts.get("base_model")
    kinds = " and then ".join(s["title"] for s in facts["stages"])
    if base and kinds:
        parts.append(f"Made by tandem: {kinds}, starting from `{_code(base)}`.")
    parts.append(_use(facts))
    parts += [_stage_text(s) for s in facts["stages"]]
    parts.append(_evaluation_text(mapping(facts.get("evaluation"))))
    parts.append(_limits(facts))
    if facts.get("versions"):
        listed = ", ".join(f"{_line(k)} {_line(v)}" for k, v in facts["versions"].items())
        parts.append(f"## Versions\n\n{listed}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _stage(run: RunFacts, stage: StageFacts) -> dict[str, Any]:
    inputs = mapping(stage.manifest.get("inputs"))
    settings = mapping(run.recipe.get(stage.kind)) or mapping(find_key(inputs, "settings"))
    sources = settings.get("data")
    # A DPO stage without data trained on pairs that the run made from prompts.
    made = stage.kind == "dpo" and not sources
    if made:
        pairs = mapping(run.recipe.get("pairs"))
        sources = [pairs.get("prompts"), pairs.get("heldout")]
    return {
        "kind": stage.kind,
        "title": stage.title,
        "data": [_shown_path(p) for p in _paths(sources)],
        "made": made,
        "hashes": _hashes(inputs),
        "settings": {
            k: settings[k]
            for k in (*_SETTINGS, *_loss_options(stage))
            if settings.get(k) is not None
        },
        "examples": stage.summary.get("examples"),
        "steps": stage.summary.get("steps"),
        "ledger": mapping(stage.summary.get("ledger")),
        "quantization": stage.summary.get("quantization"),
    }


def _loss_options(stage: StageFacts) -> list[str]:
    """Return the settings, besides beta, that the stage's losses use."""
    names = loss_names(stage.kind, stage.manifest)
    known = known_losses(names)
    options = dict.fromkeys(option for loss in known for option in loss.options)
    return [name for name in options if name != "beta"]


def _header(facts: Mapping[str, Any]) -> str:
    tags = list(dict.fromkeys(["tandem", *(s["kind"] for s in facts["stages"])]))
    header: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    # The Hub refuses a card whose base model or data set is no Hub id.
    if _HUB_ID.fullmatch(str(facts.get("base_model") or "")):
        header["base_model"] = facts["base_model"]
    data_sets = [d for s in facts["stages"] for d in s["data"] if _HUB_ID.fullmatch(d)]
    if data_sets:
        header["datasets"] = list(dict.fromkeys(data_sets))
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"


def _use(facts: Mapping[str, Any]) -> str:
    template = facts.get("chat_template")
    named = f" (`{_code(template)}`)" if template else ""
    return (
        f"## Use\n\nThe chat template{named} is saved with the tokenizer; "
        "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` gives the tokens "
        "that the model was trained on.\n\n"
        "```\ntandem chat PATH_OF_THIS_FOLDER\n```"
    )


def _stage_text(stage: Mapping[str, Any]) -> str:
    lines = [f"## {_line(stage['title'])}", ""]
    if stage["data"]:
        made = "pairs made in this run from prompts of " if stage.get("made") else ""
        lines.append(f"Data: {made}" + ", ".join(f"`{_code(d)}`" for d in stage["data"]) + ".")
    figures = [
        f"{count(stage[key])} {noun}"
        for key, noun in (("examples", "examples seen"), ("steps", "optimizer steps"))
        if is_number(stage[key])
    ]
    ledger = stage["ledger"]
    figures += [
        f"{count(ledger[k])} {k}"
        for k in ("split", "truncated", "dropped")
        if is_number(ledger.get(k))
    ]
    if figures:
        lines += ["", "; ".join(figures) + "."]
    if stage.get("quantization"):
        lines += [
            "",
            f"The base was in 4 bits ({_line(stage['quantization'])}) while the adapter was "
            "trained; it was merged into what the weights had rounded to.",
        ]
    if stage["settings"]:
        rows = [(k.replace("_", " "), _value(v)) for k, v in stage["settings"].items()]
        lines += ["", *_table(("setting", "value"), rows)]
    if stage["hashes"]:
        lines += ["", *_table(("input", "SHA-256"), [(k, f"`{h}`") for k, h in stage["hashes"]])]
    return "\n".join(lines)


def _evaluation_text(evaluation: Mapping[str, Any]) -> str:
    rows = result_rows.result_rows(evaluation)
    if not rows:
        return "## Evaluation\n\nThis run has not evaluated the model."
    head = ("model", *(m.title for m in result_rows.shown_measures(evaluation)))
    body = [
        (r.label, *(c.text + (f" ({c.note})" if c.note else "") for c in r.cells)) for r in rows
    ]
    counts = mapping(evaluation.get("counts"))
    known = [f"{count(n)} {_line(k)}" for k, n in counts.items() if is_number(n)]
    note = f"\n\nHeld out: {', '.join(known)}." if known else ""
    own = "\n".join(_table(head, body)) + note if len(head) > 1 else ""
    return "\n\n".join(p for p in ("## Evaluation", own, _tasks_text(evaluation)) if p)


def _tasks_text(evaluation: Mapping[str, Any]) -> str:
    """Return the harness's tasks with standard errors, and notes on them."""
    keys = {measure.key for measure in result_rows.task_measures(evaluation)}
    compared = result_rows.compared_rows(evaluation, "previous")
    rows = [row for row in compared if row.measure.key in keys]
    if not rows:
        return ""
    names = [model_label(n) for n in model_names(evaluation)]
    body = [(f"{r.measure.title} ({r.details})", *(c.text for c in r.cells)) for r in rows]
    notes = "\n".join(f"- {_line(note)}." for note in result_rows.task_notes(evaluation))
    table = "\n".join(_table(("task", *names), body))
    text = f"Tasks of lm-evaluation-harness; ± is one standard error.\n\n{table}"
    return text + (f"\n\n{notes}" if notes else "")


def _limits(facts: Mapping[str, Any]) -> str:
    lines = [
        "## Limits",
        "",
        "- The figures above are from this run's own held-out data and the tasks named, one seed"
        + (f" ({facts['seed']})" if is_number(facts.get("seed")) else "")
        + "; they say nothing about other tasks.",
        "- No safety evaluation was made. The model can be wrong and can repeat its data.",
        "- The licences of the base model and of the data apply to this model.",
    ]
    return "\n".join(lines + [f"- Seen in this run: {_line(w)}" for w in facts.get("warnings", ())])


def _paths(value: object) -> list[str]:
    """Return every `path` in nested plain data, in order."""
    own = mapping(value).get("path")
    inner = value if isinstance(value, list) else list(mapping(value).values())
    return [*([own] if isinstance(own, str) else []), *(p for one in inner for p in _paths(one))]


def _shown_path(path: str) -> str:
    # The folders of the machine that trained are private.
    return Path(path).name if path.startswith(("/", "~")) else path


def _hashes(value: object, key: str = "") -> list[tuple[str, str]]:
    """Return all SHA-256 digests in a manifest's inputs, each with its key."""
    if isinstance(value, str):
        return [(_shown_path(key), value)] if _DIGEST.fullmatch(value) else []
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, list):
        items = [(str(i), v) for i, v in enumerate(value, start=1)]
    else:
        return []
    return [h for k, v in items for h in _hashes(v, f"{key} {_shown_path(k)}".strip())]


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k.replace('_', ' ')} {_value(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return " ".join(str(v) for v in value)
    return str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_line(c).replace("|", "\\|") for c in line) + " |" for line in lines]


def _line(text: object) -> str:
    """Write text from a file on one Markdown line, without raw HTML."""
    return " ".join(str(text).split()).replace("<", "&lt;")


def _code(text: object) -> str:
    return " ".join(str(text).split()).replace("`", "'")
