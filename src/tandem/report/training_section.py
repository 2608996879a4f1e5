"""The page's section on a training stage: figures, charts, lengths, ledger, savings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.losses.known import known_losses
from tandem.report.plots import Bar, Series, bar_chart, histogram, line_chart, smoothing_window
from tandem.report.run_facts import StageFacts, find_key, loss_names
from tandem.result_warnings import mapping
from tandem.storage.run_folder import TRAINING_STAGES
from tandem.wording import count, duration, is_number, number, percent, short_count, size


@dataclass(frozen=True)
class Figure:
    """A chart with its title and one line on what it shows."""

    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class _Chart:
    """A chart of those of its metrics, (key, name, colour) each, that were logged."""

    title: str
    caption: str
    lines: tuple[tuple[str, str, str], ...]
    y_format: Callable[[float], str] = number
    stages: tuple[str, ...] = TRAINING_STAGES
    unit: float = 1.0
    from_zero: bool = False


_CHARTS = (
    _Chart("Loss", "negative log-prob per trained token", (("loss", "loss", "blue"),),
           stages=("sft",)),
    _Chart("Loss", "ln 2 = 0.693 at step 0", (("loss", "loss", "blue"),), stages=("dpo",)),
    _Chart("Reward margin", "beta × (policy − reference), chosen minus rejected",
           (("rewards/margins", "margin", "violet"),)),
    _Chart("Reward accuracy", "pairs of the step whose chosen answer gained more",
           (("rewards/accuracies", "accuracy", "teal"),), percent),
    _Chart("Log-probs of the answers",
           "summed over an answer; a falling chosen line is a warning sign",
           (("logps/chosen", "chosen", "teal"), ("logps/rejected", "rejected", "rose"))),
    _Chart("Rewards", "beta × log-prob gained over the reference",
           (("rewards/chosen", "chosen", "teal"), ("rewards/rejected", "rejected", "rose"))),
    _Chart("Learning rate", "as applied at the step", (("learning_rate", "rate", "amber"),)),
    _Chart("Gradient norm", "before clipping", (("grad_norm", "norm", "amber"),)),
    _Chart("Throughput", "tokens fed per second",
           (("tokens_per_second", "tokens/s", "blue"),), short_count, from_zero=True),
    _Chart("Memory", "highest so far, GiB", (("memory_bytes", "memory", "blue"),),
           lambda x: number(x, 3), unit=2.0**30, from_zero=True),
)  # fmt: skip
# What an answer's reward is, by the registry's word for it.
_REWARDS = {
    "ratio": "beta × (policy − reference)",
    "policy": "beta × log-prob",
    "mean": "beta × log-prob a token",
}
# The colour of a held-out curve beside a training curve's.
_HELD_OUT_TONES = {"blue": "rose", "violet": "amber", "teal": "amber"}


# The colours of the lines of a chart that has one for each data set, in turn.
_TONES = ("blue", "rose", "teal", "amber", "violet")


def tiles(stage: StageFacts) -> list[tuple[str, str]]:
    """Return the key figures that a stage's summary has, as (title, value)."""
    s = stage.summary
    seconds, tokens = s.get("train_seconds"), s.get("tokens")
    rate = tokens / seconds if is_number(tokens) and is_number(seconds) and seconds else None
    figures = [
        ("steps", count(s.get("steps"))),
        ("examples", count(s.get("examples"))),
        ("tokens fed", short_count(tokens) if is_number(tokens) else ""),
        ("training", duration(seconds)),
        ("reference pass", duration(s.get("reference_seconds") or None)),
        ("tokens per second", short_count(rate) if rate else ""),
        ("peak memory", size(s.get("peak_memory_bytes") or None)),
        ("device", " ".join(str(s[k]) for k in ("device", "dtype") if s.get(k))),
        ("attention", str(s.get("attention") or "")),
        ("micro-batches", f"{s['fill']:.0%} full" if is_number(s.get("fill")) else ""),
        *_sharing(s),
        *_held_out(s),
        *_against_estimates(s),
    ]
    return [(title, value) for title, value in figures if value and value != "–"]


def _against_estimates(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return time and memory, divided by their estimates before the stage."""
    figures = []
    for name, title in (("seconds", "time by its estimate"), ("memory", "memory by its estimate")):
        figure = mapping(mapping(summary.get("estimate")).get(name))
        estimated, actual = figure.get("estimated"), figure.get("actual")
        if is_number(estimated) and is_number(actual) and estimated > 0:
            figures.append((title, f"{actual / estimated:.2f}x"))
    return figures


def _sharing(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return how several processes shared the work."""
    processes, imbalance = summary.get("processes"), summary.get("imbalance")
    if not is_number(processes) or processes < 2:
        return []
    figures = [("engine", f"{summary.get('engine', 'ddp')}, {processes} processes")]
    if is_number(imbalance):
        figures.append(("busiest process", f"{imbalance - 1:.1%} above the mean"))
    return figures


def _held_out(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the first and last held-out scores, and which step's adapter was kept."""
    validation = mapping(summary.get("validation"))
    first, last = (mapping(validation.get(key)) for key in ("first", "last"))
    figures = [("held-out records", count(validation.get("records")))]
    for key, title, show in (
        ("eval_loss", "held-out loss", lambda x: number(x, 3)),
        ("eval_rewards/accuracies", "held-out accuracy", percent),
    ):
        if is_number(first.get(key)) and is_number(last.get(key)):
            figures.append((title, f"{show(first[key])} → {show(last[key])}"))
    if summary.get("best_metric"):
        figures.append(("kept", f"step {summary.get('kept_step')}, best {summary['best_metric']}"))
    early = mapping(summary.get("early_stopping"))
    if early:
        figures.append(("stopped early", f"step {early.get('step')} of {early.get('of')}"))
    return figures


def curves(stage: StageFacts) -> list[Figure]:
    """Return a chart for everything in `_CHARTS` that the stage logged."""
    figures, captions = [], _captions(stage)
    for chart in _CHARTS:
        if stage.kind not in chart.stages:
            continue
        series = [_series(stage.metrics, *line, unit=chart.unit) for line in chart.lines]
        if len(series) == 1:
            key, name, tone = chart.lines[0]
            tone = _HELD_OUT_TONES.get(tone, tone)
            held_out = (f"eval_{key}", f"held-out {name}", tone)
            series.append(_series(stage.validation, *held_out, unit=chart.unit))
        svg = line_chart(
            [one for one in series if one.ys and any(one.ys)],
            label=f"{chart.title} by step",
            y_format=chart.y_format,
            from_zero=chart.from_zero,
        )
        if svg:
            figures.append(Figure(chart.title, captions.get(chart.title, chart.caption), svg))
        if chart.title == "Loss":
            figures += _losses_of_data_sets(stage)
    return figures


def _losses_of_data_sets(stage: StageFacts) -> list[Figure]:
    """Return a chart of the loss of each data set, and one of their held-out losses."""
    figures = []
    for lines, start, title in (
        (stage.metrics, "loss_of/", "Loss by data set"),
        (stage.validation, "eval_loss_of/", "Held-out loss by data set"),
    ):
        keys = dict.fromkeys(key for line in lines for key in line if key.startswith(start))
        series = [
            _series(lines, key, key.removeprefix(start), _TONES[place % len(_TONES)], unit=1.0)
            for place, key in enumerate(keys)
        ]
        svg = line_chart([one for one in series if one.ys], label=f"{title} by step")
        if svg:
            figures.append(Figure(title, "each over its own records of these steps", svg))
    return figures


def _captions(stage: StageFacts) -> dict[str, str]:
    """Return the captions of charts of losses that are not the usual one."""
    names = loss_names(stage.kind, stage.manifest)
    if not names:
        return {}
    captions = {"Loss": f"of {', '.join(names)}"}
    known = known_losses(names)
    rewards = {loss.reward for loss in known if loss.reward}
    if len(rewards) == 1 and (words := _REWARDS.get(rewards.pop())):
        captions["Reward margin"] = f"{words}, chosen minus rejected"
        captions["Rewards"] = words
    if not any(loss.reference for loss in known):
        captions["Reward accuracy"] = "pairs of the step whose chosen answer has the higher reward"
    if any(loss.compared == "answers" for loss in known):
        captions["Log-probs of the answers"] = "summed over an answer, of good and bad ones"
    return captions


def smoothing_note(stage: StageFacts) -> str:
    """Return how the curves are drawn, if the bold line is not what was logged."""
    window = smoothing_window(len(stage.metrics))
    if window == 1:
        return ""
    return (
        f"Thin lines: as logged. Bold lines and the figures at their ends: centred mean of up to "
        f"{window} logged values."
    )


def lengths(stage: StageFacts) -> list[Figure]:
    """Return histograms of sequence and prompt lengths, with the length limits if near."""
    inputs, figures = stage.manifest.get("inputs"), []
    for key, title, limit_key, tone in (
        ("sequence", "Sequence lengths", "max_length", "blue"),
        ("prompt", "Prompt lengths", "max_prompt_length", "violet"),
    ):
        # A text that is trained whole has no prompt.
        if key == "prompt" and find_key(inputs, "loss_on") == "text":
            continue
        raw = mapping(stage.summary.get("lengths")).get(key)
        values = [float(v) for v in raw if is_number(v)] if isinstance(raw, list) else []
        limit = find_key(inputs, limit_key)
        limit = float(limit) if is_number(limit) else None
        svg = histogram(values, label=title, x_label="tokens", tone=tone, limit=limit)
        if svg:
            middle = sorted(values)[len(values) // 2]
            caption = (
                f"{count(len(values))} of them: median {count(middle)}, "
                f"mean {count(sum(values) / len(values))}, longest {count(max(values))} tokens"
            )
            figures.append(Figure(title, caption, svg))
    return figures


def savings(stage: StageFacts) -> Figure | None:
    """Return a chart of tokens fed, compared with padding and with unshared prompts."""
    s = stage.summary
    fed, padded, shared = (s.get(k) for k in ("tokens", "padded_tokens", "shared_tokens"))
    if not is_number(fed) or not fed:
        return None
    bars = [Bar("fed", fed, f"{short_count(fed)} tokens", "teal")]
    if is_number(shared) and shared:
        apart = fed + shared
        note = f"{short_count(apart)}, {apart / fed:.2f}×"
        bars.append(Bar("without sharing prompts", apart, note, "blue"))
    if is_number(padded) and padded:
        note = f"{short_count(padded)}, {padded / fed:.2f}×"
        bars.append(Bar("padded batches", padded, note, "rose"))
    if len(bars) == 1:
        return None
    others = "padded batches" if bars[-1].label == "padded batches" else "separate sequences"
    return Figure(
        "What packing and sharing saved",
        f"the model computed {percent(fed / bars[-1].value, 0)} of the tokens that {others} "
        "of the same examples hold",
        bar_chart(bars, label="Tokens fed, without sharing, and padded"),
    )


def ledger_counts(stage: StageFacts) -> list[tuple[str, str]]:
    """Return the numbers of records read, trained on, held out, split, truncated and dropped."""
    ledger = mapping(stage.summary.get("ledger"))
    keys = ("read", "trained", "held_out", "split", "truncated", "dropped")
    return [
        (key.replace("_", " "), count(ledger[key])) for key in keys if is_number(ledger.get(key))
    ]


def ledger_reasons(stage: StageFacts) -> list[tuple[str, str]]:
    """Return why records were truncated or dropped, most frequent first."""
    reasons = mapping(mapping(stage.summary.get("ledger")).get("reasons"))
    counted = [(str(reason), n) for reason, n in reasons.items() if is_number(n)]
    return [(reason, count(n)) for reason, n in sorted(counted, key=lambda item: -item[1])]


def answered_prompts(stage: StageFacts) -> list[dict[str, Any]]:
    """Return each prompt that was answered on the way, with its answers as (step, text)."""
    prompts: dict[Any, dict[str, Any]] = {}
    for line in stage.samples:
        system = f"{line['system']}\n" if line.get("system") else ""
        shown = {"prompt": f"{system}{line.get('prompt', '')}", "answers": []}
        one = prompts.setdefault(str(line.get("number")), shown)
        cut = "" if line.get("ended", True) else " …"
        one["answers"].append((str(line.get("step", "")), f"{line.get('answer', '')}{cut}"))
    return list(prompts.values())


def _series(
    metrics: Sequence[Mapping[str, Any]], key: str, name: str, tone: str, *, unit: float
) -> Series:
    rows = [m for m in metrics if is_number(m.get("step")) and isinstance(m.get(key), int | float)]
    return Series(name, [float(m["step"]) for m in rows], [m[key] / unit for m in rows], tone)
