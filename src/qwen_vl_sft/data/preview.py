"""The first row of a run as the model sees it, and what of it is learned: for a person to look at before training."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator

from qwen_vl_sft.data.dataset import Rows
from qwen_vl_sft.data.encoding import IGNORE_INDEX, Encoded, Encoder
from qwen_vl_sft.data.scan import Scan

_INDENT = " " * 4


def preview(train: Scan | Rows, encoder: Encoder) -> str:
    """The row's tokens as text, at most 80 columns: images by their size, what is learned between {{ and }}.

    Raises `BadRow` when it cannot be read.
    """
    rows = train.rows if isinstance(train, Scan) else train
    row = rows.encode(next(iter(rows.dataset)) if rows.streamed else {"row": 0}, encoder)
    learned = int((row.labels != IGNORE_INDEX).sum())
    about = f"{rows.where(row.row_id)}: {len(row.labels):,} tokens, {learned:,} of them learned, between {{{{ and }}}}"
    lines = [
        wrapped
        for line in shown(row, encoder).splitlines()
        for wrapped in textwrap.wrap(
            line,
            80,
            initial_indent=_INDENT,
            subsequent_indent=2 * _INDENT,
            break_on_hyphens=False,
        )
        or [""]
    ]
    return "\n".join([*textwrap.wrap(f"first row   {about}", 80, subsequent_indent=" " * 12), *lines])


def shown(row: Encoded, encoder: Encoder) -> str:
    """All tokens of a row as text, special ones too; the tokens of an image as its size and their number."""
    images, tokenizer = _images(row, encoder), encoder.processor.tokenizer
    parts = []
    kinds = zip((row.labels != IGNORE_INDEX).tolist(), row.mm_token_type_ids.bool().tolist(), strict=True)
    place = 0
    for (is_learned, is_image), run in itertools.groupby(kinds):
        stop = place + len(list(run))
        text = next(images) if is_image else tokenizer.decode(row.input_ids[place:stop], skip_special_tokens=False)
        parts.append(f"{{{{{text}}}}}" if is_learned else text)
        place = stop
    return "".join(parts)


def _images(row: Encoded, encoder: Encoder) -> Iterator[str]:
    processor = encoder.processor.image_processor
    for image in row.images:
        _, height, width = (int(patches) * processor.patch_size for patches in image.grid)
        tokens = int(image.grid.prod()) // processor.merge_size**2
        yield f"[image of {width} x {height} pixels, {tokens:,} tokens]"
