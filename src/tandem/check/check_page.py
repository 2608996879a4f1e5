"""What `tandem check` prints: a page for people, or one JSON object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from tandem.check.findings import Finding, visible
from tandem.check.survey_result import Histogram, LengthQuantiles, Survey
from tandem.data.sources.rows import origin_names
from tandem.errors import UserError

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
# Cells of the longest bar.
_BAR = 40
# Keys in the list of those that are not read.
_KEYS = 20


def as_json(found: Survey) -> dict[str, Any]:
    """A survey as plain values; keys are only ever added."""
    target, limits = found.target, found.target.options.limits
    return {
        "stage": target.stage,
        "held_out": target.held_out,
        "kind": target.options.kind,
        "sources": [
            {"path": source.path, "format": found.formats.get(source.path),
             "looked_at": number < found.looked_at}
            for number, source in enumerate(target.sources)
        ],
        "unread_keys": list(found.unread),
        "unread_keys_cut": found.unread_cut,
        "limit": found.limit,
        "records": found.counts,
        "reasons": found.reasons,
        "turns": {str(turns): count for turns, count in sorted(found.roles.turns.items())},
        "roles": {
            role: {"texts": languages.total(), "languages": dict(languages.most_common())}
            for role, languages in found.roles.languages.items()
        },
        "lengths": {
            "unit": found.unit,
            "max_length": limits.sequence if target.limited else None,
            "max_prompt_length": limits.prompt if target.limited else None,
            "parts": {name: asdict(measure) for name, measure in found.measures.items()},
            "histogram": _plain(found.histogram),
        },
        "compared_with": [
            {"name": other.name, "rows": other.rows, "unreadable": other.unreadable,
             "one_run_of": other.sampled}
            for other in found.others
        ],
        "findings": [finding.as_json() for finding in found.findings],
        "trains": found.problem is None,
        "problem": found.problem,
    }  # fmt: skip


def _plain(histogram: Histogram | None) -> dict[str, list[int]] | None:
    if histogram is None:
        return None
    return {"edges": list(histogram.edges), "counts": list(histogram.counts)}


def print_survey(console: Console, found: Survey, tokenizer: str | None) -> None:
    """Print a survey as a page; `tokenizer` is what lengths were measured with, None without."""
    for line in _lines(console, found, tokenizer):
        console.print(_visible(console, line), soft_wrap=True)


def _visible(console: Console, line: Text) -> Text:
    """A line without what would steer a terminal or cannot be encoded: keys and names hold it."""
    if line.plain.isprintable():
        return line
    return Text.assemble(
        *(
            ("\n".join(map(visible, part.text.split("\n"))), part.style or "")
            for part in line.render(console)
        )
    )


def _lines(console: Console, found: Survey, tokenizer: str | None) -> Iterator[Text]:
    target = found.target
    for number, source in enumerate(target.sources):
        known = found.formats.get(source.path)
        what = f"{known}, {target.options.kind}" if known else "no format was recognised"
        if number >= found.looked_at:
            what = "not looked at"
        yield Text.assemble((source.path, "bold"), f": {what}")
    if found.unread:
        yield Text(f"keys that are not read: {_keys(found)}")
    if found.limit is not None:
        yield Text(f"only the first {found.limit} rows were looked at (--limit)", "yellow")
    counts = found.counts
    as_stage = f" as {target.stage} would" if target.stage else ""
    as_stage += " to hold them out" if target.held_out else ""
    use = "to score" if target.held_out else "to train on"
    yield Text(
        f"{_records(counts['read'])} read{as_stage}: {counts['trained']:,} {use}"
        f" ({counts['truncated']:,} of them truncated), {counts['dropped']:,} dropped"
    )
    yield Text()
    yield from _turns(found)
    yield from _lengths(console, found, tokenizer)
    yield from _findings(found)
    yield from _verdict(found)


def _keys(found: Survey) -> str:
    named, left = ", ".join(found.unread[:_KEYS]), len(found.unread) - _KEYS
    if found.unread_cut:
        return f"{named}, and more than {left} more (--json lists {len(found.unread)})"
    return f"{named}, and {left} more (--json lists them)" if left > 0 else named


def _turns(found: Survey) -> Iterator[Text]:
    turns = found.roles.turns
    if not turns:
        return
    listing = ", ".join(
        f"{n} ({_share(count, turns.total())})" for n, count in turns.most_common(4)
    )
    more = f", up to {max(turns)}" if len(turns) > 4 else ""
    yield Text.assemble(("turns a record  ", "bold"), listing, more)
    rows = [("role", "texts", "languages (a guess)")]
    for role, languages in found.roles.languages.items():
        rows.append((role, f"{languages.total():,}", _languages(languages)))
    yield from _table(rows, right=(1,))
    yield Text()


def _languages(found: Counter[str]) -> str:
    most = found.most_common(6)
    text = ", ".join(f"{name} {_share(count, found.total())}" for name, count in most)
    left = len(found) - len(most)
    return text + (f" and {left} more" if left else "")


def _lengths(console: Console, found: Survey, tokenizer: str | None) -> Iterator[Text]:
    if found.histogram is None:
        return
    target = found.target
    how = (
        f"tokens of {tokenizer}, before anything is cut"
        if tokenizer
        else "characters; for tokens give --model or --recipe"
    )
    yield Text.assemble(("lengths", "bold"), f" in {how}")
    names = ("mean", "least", "median", "p95", "p99", "most", "total")
    rows: list[Sequence[str]] = [("", *names)]
    for name, measure in found.measures.items():
        rows.append((name, *_cells(measure, names)))
    yield from _table(rows, right=tuple(range(1, len(names) + 1)))
    yield Text()
    limit = target.options.limits.sequence if target.limited and tokenizer else None
    yield from _bars(console, found.histogram, limit)
    if target.limited and tokenizer:
        prompt = target.options.limits.prompt
        yield Text(
            f"limits: max_length {target.options.limits.sequence:,}"
            + (f", max_prompt_length {prompt:,}" if prompt is not None else "")
            + f"; {_records(found.counts['truncated'])} truncated"
        )
    elif tokenizer:
        yield Text("no limits: give --recipe to see what a run would cut")
    yield Text()


def _cells(measure: LengthQuantiles, names: Sequence[str]) -> list[str]:
    values = asdict(measure)
    return [f"{values[name]:,.0f}" for name in names]


def _bars(console: Console, histogram: Histogram, limit: int | None) -> Iterator[Text]:
    """A bar for each bin; those that reach beyond the limit in another colour, and marked."""
    mark = "\u2588" if "utf" in console.encoding.lower() else "#"
    # The last bar has its upper edge as well.
    ends = [*(high - 1 for high in histogram.edges[1:-1]), histogram.edges[-1]]
    edges = [
        f"{low:,}-{high:,}" if high > low else f"{low:,}"
        for low, high in zip(histogram.edges, ends, strict=False)
    ]
    wide, most = max(map(len, edges)), max(histogram.counts)
    for name, count, low, high in zip(edges, histogram.counts, histogram.edges, ends, strict=False):
        beyond = limit is not None and high > limit
        cells = max(1, round(_BAR * count / most)) if count else 0
        line = Text(f"  {name:>{wide}}  ")
        line.append(mark * cells, "yellow" if beyond else "green")
        line.append(f" {count:,}" if cells else f"{count:,}")
        if limit is not None and high > limit:
            line.append(f"  {'' if low > limit else 'partly '}beyond max_length", "dim")
        yield line


def _findings(found: Survey) -> Iterator[Text]:
    for other in found.others:
        text = f"compared with {other.name}: {other.rows:,} rows"
        if other.sampled > 1:
            text += f"; it is large, so one of {other.sampled} runs of words was compared"
        if other.unreadable:
            text += f"; {other.unreadable:,} rows of it cannot be parsed"
        yield Text(text)
    if not found.findings:
        yield Text("nothing was found that should be looked at", "green")
        return
    yield Text("findings", "bold")
    files = _files(found)
    for finding in found.findings:
        yield _head(finding)
        for row in finding.rows:
            alone = f"row {row.row}"
            where = alone if len(files) == 1 else f"{_short(row.file, files)}, {alone}"
            shown = f"  {row.excerpt}" if row.excerpt else ""
            yield Text.assemble("      ", (where, "dim"), shown)
        yield Text(f"      {finding.sign.hint}", "dim italic")


def _files(found: Survey) -> set[str]:
    """The files of all sources, those that cannot be read left out."""
    files = {row.file for finding in found.findings for row in finding.rows}
    for source in found.target.sources:
        with suppress(UserError):
            files.update(origin_names([source]))
    return files


def _short(file: str, files: Set[str]) -> str:
    """The end of a file's path that no other one has."""
    parts = Path(file).parts
    others = [Path(other).parts for other in files if other != file]
    for count in range(1, len(parts)):
        if all(other[-count:] != parts[-count:] for other in others):
            return str(Path(*parts[-count:]))
    return file


def _head(finding: Finding) -> Text:
    sign = finding.sign
    kinds = ", ".join(
        f"{count} {kind}" for kind, count in finding.kinds.items() if kind not in sign.title
    )
    return Text.assemble(
        "  ",
        (f"{sign.severity:<8}", _STYLES[sign.severity]),
        (f"{finding.count:,}", "bold"),
        f" of {finding.of:,} {sign.of} ({_share(finding.count, finding.of)}): ",
        sign.title,
        f" ({kinds})" if kinds else "",
    )


def _verdict(found: Survey) -> Iterator[Text]:
    yield Text()
    if found.problem is None:
        so_far = "" if found.unit == "tokens" else ", as far as texts alone can tell"
        does = "score its adapters" if found.target.held_out else "train"
        yield Text(f"a run would {does} on this{so_far}", "bold green")
        return
    yield Text("a run would stop here:", "bold red")
    yield Text(found.problem)


def _table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> Iterator[Text]:
    """Columns under a dim first row, wide enough for what is in them; the last is not filled up."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield Text("  " + "  ".join(cells).rstrip(), "dim" if not number else "")


def _share(count: int, total: int) -> str:
    """A percentage with as many digits as it needs not to be 0."""
    share = count / total if total else 0.0
    if share and share < 0.001:
        return "<0.1 %"
    return f"{share:.1%}".replace("%", " %") if share < 0.1 else f"{share:.0%}".replace("%", " %")


def _records(count: int) -> str:
    return f"{count:,} record" + ("" if count == 1 else "s")
