"""How DPO's speed and memory grow: `python -m benchmarks.sweeps`.

tandem against the plain loop at one pair at a time, on synthetic pairs of one length, as the
prompt's share, the length and the vocabulary vary; a 10M model (its layers) in float32. Every
token is a word of a tokenizer made here, so lengths are exact.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tandem.report.plots import Series

from .apart import Apart
from .charts import sweep_chart
from .record import Environment, Record, Task, log, resumed, take_turns
from .tables import RESULTS
from .work import SEED, Work, write_model

SPECIAL = ["<unk>", "<s>", "</s>"]


@dataclass(frozen=True)
class Point:
    """One set of pairs: all sequences have `length` tokens, `share` percent in the prompt.

    The chat template's headers come on top of them, in the prompt.
    """

    share: int
    length: int
    vocabulary: int


CENTRE = Point(share=50, length=1024, vocabulary=32000)
AXES: dict[str, tuple[str, str]] = {
    "share": ("Prompt's share of a sequence", "%"),
    "length": ("Length of a sequence", "tokens"),
    "vocabulary": ("Vocabulary", "tokens"),
}


def main(arguments: Sequence[str] | None = None, apart: Callable[[int], Any] = Apart) -> str:
    """Measure all points and return the page."""
    options = _parse(arguments)
    points = _points(options)
    record = Record(
        settings={
            "pairs": options.pairs,
            "repeats": options.repeats,
            "size": options.size,
            "points": [asdict(point) for point in points],
        },
        environment=Environment.here(options.threads),
    )
    file = options.results / "sweeps.json"
    keep = options.save or options.resume
    if options.resume:
        record = resumed(record, file)
    bench = apart(options.threads)
    for point in points:
        # A model of 128k words is 130 MB: one at a time.
        with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
            scratch = Path(name)
            found = Record(record.settings, record.environment)
            found.measured = {
                side: record.measured.get(_key(point, side), []) for side in ("tandem", _PLAIN)
            }
            found.rates = [{}] * options.repeats  # no roofline here
            tasks = _tasks(options, point, scratch, found)
            log(f"{point}")
            if tasks:
                (scratch / "runs").mkdir()
                take_turns(bench, tasks, found, scratch / "runs", None)
        record.measured |= {_key(point, side): ones for side, ones in found.measured.items()}
        if keep:
            file.parent.mkdir(parents=True, exist_ok=True)
            record.save(file)
    if keep:
        write(record, file)
    text = markdown(record)
    print(text, flush=True)
    return text


_PLAIN = "plain loop, 1 at a time"


def _points(options: argparse.Namespace) -> list[Point]:
    """The axes cross in the centre, which is measured once."""
    points = [Point(share, CENTRE.length, CENTRE.vocabulary) for share in options.shares]
    points += [Point(CENTRE.share, length, CENTRE.vocabulary) for length in options.lengths]
    points += [Point(CENTRE.share, CENTRE.length, size) for size in options.vocabularies]
    return list(dict.fromkeys(points))


def _tasks(options: argparse.Namespace, point: Point, scratch: Path, found: Record) -> list[Task]:
    if all(len(ones) >= options.repeats for ones in found.measured.values()):
        return []
    write_tokenizer(point.vocabulary, scratch / "tokenizer")
    write_model(options.size, scratch / "tokenizer", scratch / "model")
    write_pairs(point, options.pairs, scratch / "pairs.jsonl")
    base = Work(
        side="tandem",
        stage="dpo",
        model=str(scratch / "model"),
        data=str(scratch / "pairs.jsonl"),
        scratch="",
        batch_size=options.pairs,
        threads=options.threads,
    )
    plain = Work(**base.as_dict() | {"side": "plain", "size": 1})
    return [Task(base, options.repeats), Task(plain, options.repeats)]


def write_tokenizer(vocabulary: int, folder: Path) -> None:
    """A tokenizer of `vocabulary` words w0, w1, ... between white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = SPECIAL + [f"w{i}" for i in range(vocabulary - len(SPECIAL))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def write_pairs(point: Point, count: int, file: Path) -> None:
    """Pairs of random words; both answers have the length that the prompt leaves."""
    generator = np.random.default_rng(SEED)
    prompt = point.length * point.share // 100

    def text(words: int) -> str:
        drawn = generator.integers(0, point.vocabulary - len(SPECIAL), words)
        return " ".join(f"w{i}" for i in drawn)

    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            row = {
                "system": "",
                "question": text(prompt),
                "chosen": text(point.length - prompt),
                "rejected": text(point.length - prompt),
            }
            lines.write(json.dumps(row) + "\n")


def _key(point: Point, side: str) -> str:
    return f"{point.share} %, {point.length} tokens, vocabulary {point.vocabulary}: {side}"


@dataclass(frozen=True)
class _Found:
    """A point's medians."""

    value: int
    pairs_a_second: tuple[float, float]  # tandem, plain
    loop: tuple[float, float]
    peak: tuple[int, int]

    @classmethod
    def of(cls, record: Record, point: Point, axis: str) -> _Found:
        ours, plain = (record.measured[_key(point, side)] for side in ("tandem", _PLAIN))
        return cls(
            value=getattr(point, axis),
            pairs_a_second=(
                median(one.records / one.seconds for one in ours),
                median(one.records / one.seconds for one in plain),
            ),
            loop=(
                median(one.records / one.loop_seconds for one in ours),
                median(one.records / one.loop_seconds for one in plain),
            ),
            peak=(
                int(median(one.peak_bytes for one in ours)),
                int(median(one.peak_bytes for one in plain)),
            ),
        )


def _axes(record: Record) -> dict[str, list[_Found]]:
    """Of each axis, the points along it."""
    points = [Point(**point) for point in record.settings["points"]]
    centre = asdict(CENTRE)
    return {
        axis: sorted(
            (
                _Found.of(record, point, axis)
                for point in points
                if all(getattr(point, other) == centre[other] for other in AXES if other != axis)
            ),
            key=lambda found: found.value,
        )
        for axis in AXES
    }


def markdown(record: Record) -> str:
    """A table an axis."""
    settings = record.settings
    lines = [
        "# DPO as prompt share, length and vocabulary vary",
        "",
        f"tandem against the plain loop at one pair at a time; {settings['pairs']} pairs of one "
        f"length, one step, the layers of the {settings['size']}M model; {settings['repeats']} "
        "run(s) each, in turns, speed with the reference included. Where an axis does not vary: "
        f"{CENTRE.share} % prompt, {CENTRE.length} tokens a sequence, vocabulary "
        f"{CENTRE.vocabulary}. `python -m benchmarks.sweeps`.",
    ]
    for axis, found in _axes(record).items():
        title, unit = AXES[axis]
        lines += [
            "",
            f"| {title}, {unit} | tandem, pairs/s | plain, pairs/s | tandem is faster by | "
            "in the loop | peak memory | plain |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {one.value} | {one.pairs_a_second[0]:.3g} | {one.pairs_a_second[1]:.3g} | "
            f"{one.pairs_a_second[0] / one.pairs_a_second[1]:.2f}x | "
            f"{one.loop[0] / one.loop[1]:.2f}x | {one.peak[0] / 2**30:.2f} GiB | "
            f"{one.peak[1] / 2**30:.2f} GiB |"
            for one in found
        ]
    where = record.environment
    lines += ["", f"{where.processor}, threads: {where.threads}, float32. {where.versions}."]
    return "\n".join(lines) + "\n"


def write(record: Record, file: Path) -> None:
    """Table and chart beside the JSON."""
    file.with_suffix(".md").write_text(markdown(record), encoding="utf-8")
    panels = []
    for axis, found in _axes(record).items():
        title, unit = AXES[axis]
        xs = [one.value for one in found]
        lines = [
            Series("times the plain loop's speed", xs, _ratios(found, "pairs_a_second"), "teal"),
            Series("share of its peak memory", xs, _ratios(found, "peak"), "blue"),
        ]
        panels.append((title, unit, lines))
    file.with_suffix(".svg").write_text(sweep_chart(panels), encoding="utf-8")


def _ratios(found: Sequence[_Found], what: str) -> list[float]:
    return [getattr(one, what)[0] / getattr(one, what)[1] for one in found]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweeps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shares", type=int, nargs="+", default=(10, 30, 50, 70, 90), help="percent")
    add("--lengths", type=int, nargs="+", default=(256, 512, 1024, 2048))
    add("--vocabularies", type=int, nargs="+", default=(8000, 32000, 128000))
    add("--pairs", type=int, default=8)
    add("--repeats", type=int, default=1)
    add("--size", type=int, choices=(1, 10, 60, 150), default=10, help="million parameters")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)))
    add("--save", action="store_true", help="also write JSON, table and chart to --results")
    add("--resume", action="store_true", help="--save, without what the JSON already holds")
    add("--results", type=Path, default=RESULTS, help="where --save and --resume write")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
