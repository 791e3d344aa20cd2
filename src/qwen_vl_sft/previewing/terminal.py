"""An inspection as text of at most 80 columns, with and without colors, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from qwen_vl_sft.data.preview import describe_row
from qwen_vl_sft.errors import BadRow, shortened
from qwen_vl_sft.previewing.findings import Finding
from qwen_vl_sft.previewing.inspection import Inspection
from qwen_vl_sft.previewing.statistics import Batches, PixelLimit, Spread
from qwen_vl_sft.previewing.summary import SplitSummary
from qwen_vl_sft.tiny import builtin_name

WIDTH, _MARGIN = 80, 12
_RED, _YELLOW, _GREEN, _PLAIN = "\x1b[31m", "\x1b[33m", "\x1b[32m", "\x1b[0m"
# Lines of the row that is shown.
_ROW_LINES = 24
SPREADS = {
    "tokens": "tokens of a row",
    "image_tokens": "of its images",
    "text_tokens": "of its text",
    "answer_tokens": "of its answers",
    "images_of_a_row": "images of a row",
    "questions_of_an_image": "rows of an image",
}


def verdict(found: Inspection) -> str:
    """Return one line: whether training would fail because of its data."""
    if not found.problems:
        return "nothing in the data would make training fail"
    count = len(found.problems)
    return f"training would fail: {count} problem{'s' if count > 1 else ''} in the data"


def describe(found: Inspection, colored: bool = False) -> str:
    """Return everything but the examples, and the first row."""
    model = str(found.recipe.model.model_name_or_path)
    color = _RED if found.problems else _GREEN
    lines = [
        *_wrapped("model", builtin_name(model) or model),
        *(line for summary in found.summaries for line in _wrapped(summary.name, rows_line(summary))),
        "",
        *(_colored(line, color, colored) for line in _wrapped("VERDICT", verdict(found))),
    ]
    for title, findings, color in (("problems", found.problems, _RED), ("notes", found.notes, _YELLOW)):
        if findings:
            lines += ["", title]
            lines += [line for finding in findings for line in _finding_lines(finding, color, colored)]
    for summary in found.summaries:
        lines += ["", *_spread_lines(summary)]
    if found.batches:
        lines += ["", *_batch_lines(found.batches)]
    if found.limits:
        lines += ["", *_limit_lines(found.limits)]
    lines += _row_lines(found, colored)
    return "\n".join(line.rstrip() for line in lines)


def _colored(line: str, color: str, colored: bool) -> str:
    return f"{color}{line}{_PLAIN}" if colored else line


def _wrapped(label: str, text: str, indent: int = _MARGIN) -> list[str]:
    start = f"{label:<{indent}}" if len(label) < indent else f"{label} "
    return textwrap.wrap(start + text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def named_source(summary: SplitSummary) -> str:
    """Return dataset and split, the package's own by their short names."""
    name, bracket, split = summary.source.rpartition(" [")
    return f"{builtin_name(name) or name}{bracket}{split}"


def rows_line(summary: SplitSummary) -> str:
    """Return what a split is and how many rows and images it has."""
    left_out = [f"{summary.bad:,} cannot be used"] if summary.bad else []
    left_out += [f"{summary.too_long:,} too long"] if summary.too_long else []
    rows = f"{summary.rows:,} rows{''.join(f', {text}' for text in left_out)}"
    ignored = f"; columns that are not read: {', '.join(summary.ignored_columns)}" if summary.ignored_columns else ""
    return f"{named_source(summary)}: {rows}, {summary.distinct_images:,} different images{shortened(ignored)}"


def _finding_lines(finding: Finding, color: str, colored: bool) -> Iterator[str]:
    first, *others = _wrapped(f"! {finding.split}", finding.text, _MARGIN + 2)
    yield from (_colored(line, color, colored) for line in (first, *others))
    indent = " " * (_MARGIN + 2)
    for text in (*finding.rows, *([finding.way_out] if finding.way_out else [])):
        yield from textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _spread_lines(summary: SplitSummary) -> list[str]:
    lines = [f"{summary.name:<20}{'least':>9}{'median':>10}{'mean':>10}{'95%':>10}{'most':>10}"]
    for name, label in SPREADS.items():
        found: Spread | None = getattr(summary, name)
        if found is not None and found.most:
            values = (found.least, found.median, found.mean, found.most_of_95, found.most)
            least, *others = (number(value) for value in values)
            lines.append(f"  {label:<18}{least:>9}" + "".join(f"{value:>10}" for value in others))
    return lines


def number(value: float) -> str:
    """Return a number with separators, and with one decimal where it is small and has some."""
    return f"{value:,.1f}" if value < 10 and value != int(value) else f"{value:,.0f}"


def _batch_lines(ways: Sequence[Batches]) -> Iterator[str]:
    yield f"{'an epoch, in millions of tokens':<36}{'computed':>10}{'padding':>10}{'filled':>10}"
    for way in ways:
        filled = f"{way.filled:.0%}" if way.filled is not None else ""
        yield f"  {way.way:<34}{way.computed / 1e6:>10.2f}{way.padding:>10.0%}{filled:>10}"


def _limit_lines(limits: Sequence[PixelLimit]) -> Iterator[str]:
    yield "what pixel limits cost and save"
    yield f"  {'max_pixels':>11}{'tokens':>10}{'millions':>10}{'':>7}{'longest':>10}{'rows too':>10}{'images':>9}{'to':>6}"
    yield f"  {'':>11}{'an image':>10}{'an epoch':>10}{'':>7}{'row':>10}{'long':>10}{'reduced':>9}{'':>6}"
    for limit in limits:
        change = "now" if limit.now else f"{limit.change:+.0%}" if round(limit.change, 2) else ""
        scale = f"{limit.scale:.0%}" if limit.reduced else ""
        yield (
            f"  {limit.pixels:>11,}{limit.image_tokens:>10,}{limit.tokens / 1e6:>10.2f}{change:>7}{limit.longest:>10,}"
            f"{limit.too_long:>10,}{limit.reduced:>9.0%}{scale:>6}"
        )


def _row_lines(found: Inspection, colored: bool) -> list[str]:
    train = found.splits[0]
    if not train.is_good.any():
        return []
    try:
        row = train.rows.encode({"row": int(train.is_good.argmax())}, found.encoder)
    except BadRow:
        return []
    return ["", describe_row("a row", train.rows, row, found.encoder, colored, _ROW_LINES)]


def as_json(found: Inspection) -> dict[str, Any]:
    """Return everything but the examples as values for JSON."""
    return {
        "model": str(found.recipe.model.model_name_or_path),
        "verdict": verdict(found),
        "would_fail": bool(found.problems),
        "problems": [asdict(finding) for finding in found.problems],
        "notes": [asdict(finding) for finding in found.notes],
        "splits": [asdict(summary) for summary in found.summaries],
        "overlap": asdict(found.overlap) if found.overlap else None,
        "batches": [asdict(way) for way in found.batches],
        "pixel_limits": [asdict(limit) for limit in found.limits],
    }
