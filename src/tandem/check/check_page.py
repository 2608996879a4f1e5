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
from tandem.check.survey_result import Histogram, Survey
from tandem.data.sources.rows import origin_names
from tandem.errors import UserError

_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
_BAR = 40  # cells of the longest bar
_KEYS = 20  # keys in the list of those that are not read


def as_json(survey: Survey) -> dict[str, Any]:
    """Return a survey as plain values; keys are only ever added."""
    target, limits = survey.target, survey.target.options.limits
    return {
        "stage": target.stage,
        "held_out": target.held_out,
        "kind": target.options.kind,
        "sources": [
            {"path": source.path, "format": survey.formats.get(source.path),
             "looked_at": number < survey.looked_at}
            for number, source in enumerate(target.sources)
        ],
        "unread_keys": list(survey.unread),
        "unread_keys_cut": survey.unread_cut,
        "limit": survey.limit,
        "records": survey.counts,
        "reasons": survey.reasons,
        "turns": {str(turns): count for turns, count in sorted(survey.roles.turns.items())},
        "roles": {
            role: {"texts": languages.total(), "languages": dict(languages.most_common())}
            for role, languages in survey.roles.languages.items()
        },
        "lengths": {
            "unit": survey.unit,
            "max_length": limits.sequence if target.limited else None,
            "max_prompt_length": limits.prompt if target.limited else None,
            "parts": {name: asdict(measure) for name, measure in survey.measures.items()},
            "histogram": {
                key: list(values) for key, values in asdict(survey.histogram).items()
            } if survey.histogram else None,
        },
        "compared_with": [
            {"name": other.name, "rows": other.rows, "unreadable": other.unreadable,
             "one_run_of": other.sampled}
            for other in survey.others
        ],
        "findings": [finding.as_json() for finding in survey.findings],
        "trains": survey.problem is None,
        "problem": survey.problem,
    }  # fmt: skip


def print_survey(console: Console, survey: Survey, tokenizer: str | None) -> None:
    """Print a survey as a page; lengths are in tokens of `tokenizer`, without it in characters."""
    for line in _lines(console, survey, tokenizer):
        console.print(_visible(console, line), soft_wrap=True)


def _visible(console: Console, line: Text) -> Text:
    """Return a line without control characters and lone surrogates; names may have them."""
    if line.plain.isprintable():
        return line
    parts = line.render(console)
    texts = (("\n".join(map(visible, one.text.split("\n"))), one.style or "") for one in parts)
    return Text.assemble(*texts)


def _lines(console: Console, survey: Survey, tokenizer: str | None) -> Iterator[Text]:
    target = survey.target
    for number, source in enumerate(target.sources):
        known = survey.formats.get(source.path)
        what = f"{known}, {target.options.kind}" if known else "no format was recognised"
        if number >= survey.looked_at:
            what = "not looked at"
        yield Text.assemble((source.path, "bold"), f": {what}")
    if survey.unread:
        yield Text(f"keys that are not read: {_keys(survey)}")
    if survey.limit is not None:
        yield Text(f"only the first {survey.limit} rows were looked at (--limit)", "yellow")
    counts = survey.counts
    as_stage = f" as {target.stage} would" if target.stage else ""
    as_stage += " to hold them out" if target.held_out else ""
    use = "to score" if target.held_out else "to train on"
    yield Text(
        f"{_records(counts['read'])} read{as_stage}: {counts['trained']:,} {use}"
        f" ({counts['truncated']:,} of them truncated), {counts['dropped']:,} dropped"
        + (f", {counts['split']:,} split" if "split" in counts else "")
    )
    yield Text()
    yield from _turns(survey)
    yield from _lengths(console, survey, tokenizer)
    yield from _findings(survey)
    yield from _verdict(survey)


def _keys(survey: Survey) -> str:
    named, left = ", ".join(survey.unread[:_KEYS]), len(survey.unread) - _KEYS
    if survey.unread_cut:
        return f"{named}, and more than {left} more (--json lists {len(survey.unread)})"
    return f"{named}, and {left} more (--json lists them)" if left > 0 else named


def _turns(survey: Survey) -> Iterator[Text]:
    turns = survey.roles.turns
    if not survey.roles.languages:
        return
    listing = ", ".join(
        f"{n} ({_share(count, turns.total())})" for n, count in turns.most_common(4)
    )
    more = f", up to {max(turns)}" if len(turns) > 4 else ""
    if turns:
        yield Text.assemble(("turns a record  ", "bold"), listing, more)
    languages = survey.roles.languages.items()
    rows = [(role, f"{some.total():,}", _languages(some)) for role, some in languages]
    yield from _table([("role", "texts", "languages (a guess)"), *rows], right=(1,))
    yield Text()


def _languages(counts: Counter[str]) -> str:
    most = counts.most_common(6)
    text = ", ".join(f"{name} {_share(count, counts.total())}" for name, count in most)
    left = len(counts) - len(most)
    return text + (f" and {left} more" if left else "")


def _lengths(console: Console, survey: Survey, tokenizer: str | None) -> Iterator[Text]:
    if survey.histogram is None:
        return
    target = survey.target
    how = (
        f"tokens of {tokenizer}, before anything is cut"
        if tokenizer
        else "characters; for tokens give --model or --recipe"
    )
    yield Text.assemble(("lengths", "bold"), f" in {how}")
    names = ("mean", "least", "median", "p95", "p99", "most", "total")
    rows = [
        (name, *(f"{getattr(measure, column):,.0f}" for column in names))
        for name, measure in survey.measures.items()
    ]
    yield from _table([("", *names), *rows], right=tuple(range(1, len(names) + 1)))
    yield Text()
    limit = target.options.limits.sequence if target.limited and tokenizer else None
    yield from _bars(console, survey.histogram, limit)
    if target.limited and tokenizer:
        prompt = target.options.limits.prompt
        yield Text(
            f"limits: max_length {target.options.limits.sequence:,}"
            + (f", max_prompt_length {prompt:,}" if prompt is not None else "")
            + f"; {_records(survey.counts['truncated'])} truncated"
        )
    elif tokenizer:
        yield Text("no limits: give --recipe to see what a run would cut")
    yield Text()


def _bars(console: Console, histogram: Histogram, limit: int | None) -> Iterator[Text]:
    """Yield a bar for each bin; bars beyond the limit have another colour and a mark."""
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


def _findings(survey: Survey) -> Iterator[Text]:
    for other in survey.others:
        text = f"compared with {other.name}: {other.rows:,} rows"
        if other.sampled > 1:
            text += f"; it is large, so one of {other.sampled} runs of words was compared"
        if other.unreadable:
            text += f"; {other.unreadable:,} rows of it cannot be parsed"
        yield Text(text)
    if not survey.findings:
        yield Text("nothing was found that should be looked at", "green")
        return
    yield Text("findings", "bold")
    files = _files(survey)
    for finding in survey.findings:
        yield _head(finding)
        for row in finding.rows:
            alone = f"row {row.row}"
            where = alone if len(files) == 1 else f"{_short(row.file, files)}, {alone}"
            shown = f"  {row.excerpt}" if row.excerpt else ""
            yield Text.assemble("      ", (where, "dim"), shown)
        yield Text(f"      {finding.sign.hint}", "dim italic")


def _files(survey: Survey) -> set[str]:
    """Return the files of all sources that can be read."""
    files = {row.file for finding in survey.findings for row in finding.rows}
    for source in survey.target.sources:
        with suppress(UserError):
            files.update(origin_names([source]))
    return files


def _short(file: str, files: Set[str]) -> str:
    """Return the end of a file's path that no other one has."""
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


def _verdict(survey: Survey) -> Iterator[Text]:
    yield Text()
    if survey.problem is None:
        so_far = "" if survey.unit == "tokens" else ", as far as texts alone can tell"
        does = "score its adapters" if survey.target.held_out else "train"
        yield Text(f"a run would {does} on this{so_far}", "bold green")
        return
    yield Text("a run would stop here:", "bold red")
    yield Text(survey.problem)


def _table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> Iterator[Text]:
    """Yield rows, the first one dim, with columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield Text("  " + "  ".join(cells).rstrip(), "dim" if not number else "")


def _share(count: int, total: int) -> str:
    """Write a percentage with enough digits not to be 0."""
    share = count / total if total else 0.0
    if share and share < 0.001:
        return "<0.1 %"
    return f"{share:.1%}".replace("%", " %") if share < 0.1 else f"{share:.0%}".replace("%", " %")


def _records(count: int) -> str:
    return f"{count:,} record" + ("" if count == 1 else "s")
