"""Charts of a page as inline SVG: bars stretch with the page, and their labels stay text of the page's size."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from qwen_vl_sft.previewing.statistics import Spread

_HEIGHT = 100


def histogram(found: Spread, title: str, unit: str, limit: tuple[str, int] | None = None) -> str:
    """Return a figure of how values spread; `limit`, with its name, is drawn where it is inside."""
    stop = found.start + found.width * len(found.bars)
    highest = max(found.bars)
    bars = []
    for number, count in enumerate(found.bars):
        if not count:
            continue
        low = found.start + number * found.width
        last = found.open_end and number == len(found.bars) - 1
        upper = " and more" if last else f" to {low + found.width - 1:,}" if found.width > 1 else ""
        # A bar of one row is seen too.
        height = max(1.5, _HEIGHT * count / highest)
        shape = f'x="{number + 0.06:.2f}" y="{_HEIGHT - height:.2f}" width="0.88" height="{height:.2f}"'
        bars.append(
            f"<rect {shape}{' class=more' if last else ''}><title>{low:,}{upper} {escape(unit)}: {count:,}</title></rect>"
        )
    line = ""
    note = ""
    if limit is not None and found.start < limit[1] < stop:
        place = (limit[1] - found.start) / found.width
        line = f'<line class="limit" x1="{place:.2f}" x2="{place:.2f}" y1="0" y2="{_HEIGHT}"/>'
        note = f'<span class="limit">{escape(limit[0])} {limit[1]:,}</span>'
    end = f"{stop:,} and more" if found.open_end else f"{stop - 1:,}" if found.width == 1 else f"{stop:,}"
    label = f"{title}: from {found.least:,} to {found.most:,} {unit}, half of them up to {found.median:,.0f}"
    return (
        f'<figure><figcaption>{escape(title)}{note}</figcaption><div class="plot"><span class="y">{highest:,}</span>'
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {len(found.bars)} {_HEIGHT}"'
        f' preserveAspectRatio="none">{"".join(bars)}{line}</svg>'
        f'<span class="x"><span>{found.start:,}</span><span>{escape(unit)}</span><span>{end}</span></span></div></figure>'
    )


def stacked_bars(title: str, unit: str, bars: Sequence[tuple[str, float, float, str]]) -> str:
    """Return a figure of horizontal bars: name, useful part, wasted part, and the words beside it."""
    longest = max(useful + wasted for _, useful, wasted, _ in bars) or 1.0
    lines = []
    for name, useful, wasted, words in bars:
        first, second = 100 * useful / longest, 100 * wasted / longest
        lines.append(
            f'<div class="bar-row"><span>{escape(name)}</span>'
            f'<svg role="img" aria-label="{escape(name)}: {escape(words)}" viewBox="0 0 100 10" preserveAspectRatio="none">'
            f'<rect x="0" y="0" width="{first:.2f}" height="10"/>'
            f'<rect class="waste" x="{first:.2f}" y="0" width="{second:.2f}" height="10"/></svg>'
            f"<small>{escape(words)}</small></div>"
        )
    return f"<figure><figcaption>{escape(title)} <small>{escape(unit)}</small></figcaption>{''.join(lines)}</figure>"
