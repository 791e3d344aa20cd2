"""Preview: the first row of a run as the model sees it, with the tokens that it learns, for a person to look at."""

from __future__ import annotations

import itertools
import textwrap

from qwen_vl_sft.data.dataset import Rows
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.data.labels import IGNORE_INDEX
from qwen_vl_sft.data.media import MEDIA
from qwen_vl_sft.data.scan import Scan

_INDENT = " " * 4


def preview(train: Scan | Rows, encoder: Encoder) -> str:
    """Return the row's tokens as text, at most 80 columns: images by their size, learned tokens between {{ and }}.

    Raises `BadRow` when it cannot be read.
    """
    rows = train.rows if isinstance(train, Scan) else train
    row = rows.encode(next(iter(rows.dataset)) if rows.streamed else {"row": 0}, encoder)
    counts = f"{len(row.labels):,} tokens, {row.target_tokens:,} of them learned, between {{{{ and }}}}"
    about = f"{rows.name_of(row.row_id)}: {counts}"
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
    """Return all tokens of a row as text, special ones too; the tokens of an image as its size and their number."""
    tokenizer = encoder.processor.tokenizer
    media = (MEDIA[item.kind].describe(item, encoder.processor) for item in row.media)
    parts = []
    kinds = zip((row.labels != IGNORE_INDEX).tolist(), row.mm_token_type_ids.bool().tolist(), strict=True)
    place = 0
    for (is_target, is_media), run in itertools.groupby(kinds):
        stop = place + len(list(run))
        text = next(media) if is_media else tokenizer.decode(row.input_ids[place:stop], skip_special_tokens=False)
        parts.append(f"{{{{{text}}}}}" if is_target else text)
        place = stop
    return "".join(parts)
