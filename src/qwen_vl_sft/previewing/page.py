"""The page of an inspection: charts, findings, and rows as the model sees them, in one file without a script."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from qwen_vl_sft.atomic_write import atomic_write
from qwen_vl_sft.data.preview import Piece
from qwen_vl_sft.errors import UserError, first_line
from qwen_vl_sft.html_page import asset, facts_list, fill, table
from qwen_vl_sft.previewing.charts import histogram, stacked_bars
from qwen_vl_sft.previewing.examples import Box, Example, ExampleImage, read_examples
from qwen_vl_sft.previewing.findings import Finding
from qwen_vl_sft.previewing.inspection import Inspection, most_tokens
from qwen_vl_sft.previewing.statistics import Spread
from qwen_vl_sft.previewing.summary import SplitSummary
from qwen_vl_sft.previewing.terminal import SPREADS, named_source, number, rows_line, verdict
from qwen_vl_sft.tiny import builtin_name

_PACKAGE = "qwen_vl_sft.previewing"
# Characters of a piece of text that are shown: the first and the last of them.
_FIRST, _LAST = 1500, 500
_SPECIAL = re.compile(r"&lt;\|\w+\|&gt;")
_UNITS = {name: "rows" if name == "questions_of_an_image" else "tokens" for name in SPREADS} | {
    "images_of_a_row": "images"
}


def write_page(path: Path, found: Inspection, examples: int) -> None:
    """Write the page with so many rows. Raises `UserError` where that is not possible."""
    try:
        atomic_write(path, render(found, list(read_examples(found.splits[0], found.encoder, examples))))
    except OSError as error:
        raise UserError(f"--page: {path} cannot be written: {first_line(error)}") from None


def render(found: Inspection, examples: Sequence[Example]) -> str:
    """Return the page as HTML; texts of rows reach it only escaped."""
    model = str(found.recipe.model.model_name_or_path)
    facts = {"Model": builtin_name(model) or model}
    facts |= {summary.name.capitalize(): rows_line(summary) for summary in found.summaries}
    parts = {
        "title": escape(named_source(found.summaries[0])),
        "style": asset(_PACKAGE, "page.css"),
        "facts": facts_list(facts),
        "state": "fails" if found.problems else "passes",
        "verdict": escape(verdict(found)),
        "problems": _findings("Problems", found.problems),
        "notes": _findings("Notes", found.notes),
        "numbers": "".join(_numbers(summary) for summary in found.summaries),
        "histograms": "".join(_histograms(found, summary) for summary in found.summaries),
        "batches": _batches(found),
        "limits": _limits(found),
        "examples": _examples(examples),
    }
    return fill(asset(_PACKAGE, "page.html"), parts)


def _findings(title: str, findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    lines = []
    for finding in findings:
        rows = "".join(f"<li>{escape(row)}</li>" for row in finding.rows)
        way_out = f'<div class="way-out">{escape(finding.way_out)}</div>' if finding.way_out else ""
        listed = f"<ul>{rows}</ul>" if rows else ""
        lines.append(f'<li><span class="tag">{finding.split}</span> {escape(finding.text)}{listed}{way_out}</li>')
    return f'<section><h2>{title}</h2><ul class="findings {title.lower()}">{"".join(lines)}</ul></section>'


def _numbers(summary: SplitSummary) -> str:
    body = []
    for name, label in SPREADS.items():
        found: Spread | None = getattr(summary, name)
        if found is not None and found.most:
            values = (found.least, found.median, found.mean, found.most_of_95, found.most, found.total)
            body.append([label, *(number(value) for value in values)])
    return table(f"{summary.name} in numbers", [summary.name, "least", "median", "mean", "95%", "most", "in all"], body)


def _histograms(found: Inspection, summary: SplitSummary) -> str:
    limit = most_tokens(found.recipe)
    named = None
    if limit is not None:
        named = ("max_length" if limit == found.recipe.data.max_length else "tokens_per_batch", limit)
    figures = []
    for name, label in SPREADS.items():
        spread: Spread | None = getattr(summary, name)
        if spread is not None and spread.least < spread.most:
            title = label if name == "tokens" or not label.startswith("of its") else f"tokens {label}"
            figures.append(histogram(spread, title, _UNITS[name], named if name == "tokens" else None))
    return f'<section><h2>Spread of {summary.name}</h2><div class="figures">{"".join(figures)}</div></section>'


def _batches(found: Inspection) -> str:
    if not found.batches:
        return ""
    bars = []
    for way in found.batches:
        waste = way.computed * way.padding
        filled = f", micro-batches {way.filled:.0%} full" if way.filled is not None else ""
        padded = f", {way.padding:.0%} padding" if way.padding else ""
        bars.append((way.way, way.computed - waste, waste, f"{way.computed / 1e6:,.2f} million{padded}{filled}"))
    return f"<section><h2>Batches</h2>{stacked_bars('Tokens that an epoch computes', '', bars)}</section>"


def _limits(found: Inspection) -> str:
    if not found.limits:
        return ""
    body = []
    for limit in found.limits:
        scale = f" to {limit.scale:.0%} of their sides" if limit.reduced else ""
        body.append(
            [
                f"{limit.pixels:,}",
                f"{limit.image_tokens:,}",
                f"{limit.tokens / 1e6:,.2f} million",
                "<b>now</b>" if limit.now else f"{limit.change:+.0%}",
                f"{limit.longest:,}",
                f"{limit.too_long:,}",
                f"{limit.reduced:.0%}{scale}",
            ]
        )
    headings = ["max_pixels", "tokens of an image", "tokens of an epoch", "change", "longest row", "rows too long"]
    bars = [
        (
            f"{limit.pixels:,} ({limit.image_tokens:,} an image)",
            float(limit.tokens),
            0.0,
            f"{limit.tokens / 1e6:,.2f} million",
        )
        for limit in found.limits
    ]
    chart = stacked_bars("Tokens of an epoch", "by max_pixels", bars)
    note = "<p>Computed from the sizes of the training images alone.</p>"
    made = table("what pixel limits cost and save", [*headings, "images reduced"], body)
    return f"<section><h2>What pixel limits cost and save</h2>{note}{chart}{made}</section>"


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    note = (
        '<p>Images after resizing, with the boxes that the model learns; <span class="text"><span class="learned">'
        "learned tokens</span></span> in color.</p>"
    )
    return f"<section><h2>Rows as the model sees them</h2>{note}{''.join(map(_example, examples))}</section>"


def _example(example: Example) -> str:
    images = "".join(
        _image(image, f"image {place + 1} of {example.name}") for place, image in enumerate(example.images)
    )
    more = sum(piece.media is not None for piece in example.pieces) - len(example.images)
    images += f"<p>{more:,} more images are not shown.</p>" if more > 0 else ""
    counts = f"{example.tokens:,} tokens, {example.learned:,} of them learned"
    head = f'<h3>{escape(example.why)} <span class="tag">{escape(example.name)}: {counts}</span></h3>'
    text = "".join(map(_piece, example.pieces))
    shown = f"<div>{images}</div>" if images else ""
    return f'<article class="{"" if images else "plain"}">{head}{shown}<div class="text">{text}</div></article>'


def _piece(piece: Piece) -> str:
    if piece.media is not None:
        return f'<span class="shown">{escape(piece.text)}</span>'
    text = piece.text
    if len(text) > _FIRST + _LAST:
        left_out = f'<span class="cut">[{len(text) - _FIRST - _LAST:,} characters are left out]</span>'
        shown = _text(text[:_FIRST]) + left_out + _text(text[-_LAST:])
    else:
        shown = _text(text)
    return f'<span class="learned">{shown}</span>' if piece.learned else shown


def _text(text: str) -> str:
    return _SPECIAL.sub(lambda match: f'<span class="special">{match[0]}</span>', escape(text))


def _image(image: ExampleImage, alt: str) -> str:
    address, width, height = image.shown
    drawn = _boxes(image.boxes, image.size) if image.boxes else ""
    picture = f'<img src="{address}" width="{width}" height="{height}" alt="{escape(alt)}">'
    return f'<div class="image">{picture}{drawn}</div>'


def _boxes(boxes: Iterable[Box], size: tuple[int, int]) -> str:
    """Return boxes and points drawn over an image of `size`."""
    font = max(10, size[0] // 32)
    shapes = []
    for box in boxes:
        x, y = box.numbers[:2]
        if len(box.numbers) == 4:
            right, below = box.numbers[2:]
            shapes.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{right - x:.1f}" height="{below - y:.1f}"/>')
        else:
            shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{font / 3:.1f}"/>')
        if box.name:
            place = f'x="{x:.1f}" y="{max(font, y - font / 4):.1f}" font-size="{font}"'
            shapes.append(f"<text {place}>{escape(box.name[:40])}</text>")
    width, height = size
    return f'<svg role="img" aria-label="boxes" viewBox="0 0 {width} {height}">{"".join(shapes)}</svg>'
