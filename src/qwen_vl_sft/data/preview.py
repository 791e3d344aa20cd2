"""Preview: rows as the model sees them, with the tokens that it learns, for a person to look at."""

from __future__ import annotations

import itertools
import os
import sys
import textwrap
from dataclasses import dataclass

from qwen_vl_sft.data.dataset import Rows
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.data.labels import IGNORE_INDEX
from qwen_vl_sft.data.media import MEDIA
from qwen_vl_sft.data.scan import Scan

_INDENT = " " * 4
_BRACES = ("{{", "}}")
# Of one column each, so that lines are broken where they are without colors; no tokenizer writes these.
_MARKS, _GREEN = ("\ue000", "\ue001"), ("\x1b[32m", "\x1b[0m")


@dataclass(frozen=True)
class Piece:
    """Tokens of a row that follow each other: their text, or a description of what is shown, the number `media`."""

    text: str
    learned: bool
    media: int | None = None


def preview(train: Scan | Rows, encoder: Encoder) -> str:
    """Return the first row's tokens as text of at most 80 columns: images by their size, learned tokens in braces.

    Raises `BadRow` when it cannot be read.
    """
    rows = train.rows if isinstance(train, Scan) else train
    row = rows.encode(next(iter(rows.dataset)) if rows.streamed else {"row": 0}, encoder)
    return describe_row("first row", rows, row, encoder)


def describe_row(
    title: str, rows: Rows, row: Encoded, encoder: Encoder, colored: bool = False, most_lines: int | None = None
) -> str:
    """Return a row's tokens as text of at most 80 columns: images by their size, learned tokens in braces or colored.

    `most_lines` leaves out the middle of a longer text.
    """
    how = "colored" if colored else f"between {' and '.join(_BRACES)}"
    about = f"{rows.name_of(row.row_id)}: {len(row.labels):,} tokens, {row.target_tokens:,} of them learned, {how}"
    lines = [
        wrapped
        for line in shown(row, encoder, _MARKS if colored else _BRACES).splitlines()
        for wrapped in textwrap.wrap(
            line,
            80,
            initial_indent=_INDENT,
            subsequent_indent=2 * _INDENT,
            break_on_hyphens=False,
        )
        or [""]
    ]
    if most_lines is not None and len(lines) > most_lines:
        half = most_lines // 2
        lines = [*lines[:half], f"{_INDENT}[{len(lines) - 2 * half:,} lines are left out]", *lines[-half:]]
    text = "\n".join([*textwrap.wrap(f"{title:<12}{about}", 80, subsequent_indent=" " * 12), *lines])
    for mark, color in zip(_MARKS, _GREEN, strict=True):
        text = text.replace(mark, color) if colored else text
    return text


def shown(row: Encoded, encoder: Encoder, marks: tuple[str, str] = _BRACES) -> str:
    """Return all tokens of a row as text, special ones too; the tokens of an image as its size and their number."""
    begin, end = marks
    return "".join(f"{begin}{piece.text}{end}" if piece.learned else piece.text for piece in pieces(row, encoder))


def pieces(row: Encoded, encoder: Encoder) -> list[Piece]:
    """Return all tokens of a row as text, special ones too, cut where learned ones and what is shown begin and end."""
    tokenizer = encoder.processor.tokenizer
    kinds = zip((row.labels != IGNORE_INDEX).tolist(), row.mm_token_type_ids.bool().tolist(), strict=True)
    found, numbers, place = [], itertools.count(), 0
    for (is_target, is_media), run in itertools.groupby(kinds):
        stop = place + len(list(run))
        if is_media:
            number = next(numbers)
            item = row.media[number]
            found.append(Piece(MEDIA[item.kind].describe(item, encoder.processor), is_target, number))
        else:
            text = tokenizer.decode(row.input_ids[place:stop], skip_special_tokens=False)
            found.append(Piece(text, is_target))
        place = stop
    return found


def shows_colors() -> bool:
    """Return whether the standard output is a terminal that shows colors, and the user has not turned them off."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
