"""Batches of rows: read, decode, encode and pad. Runs in the workers of the data loader."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.data.dataset import Rows
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.data.labels import IGNORE_INDEX
from qwen_vl_sft.data.media import ReadMedia, model_inputs
from qwen_vl_sft.errors import BadRow, OverLongRow
from qwen_vl_sft.modeling.flops import BatchStats

logger = logging.getLogger(__name__)
# A place in a batch that holds no row: the last step of an epoch, or of an evaluation, is filled up with these.
NO_ROW = -1
# Rows that are looked at for one that stands in for a batch without any.
_FILLERS_TRIED = 64


class Collator:
    """Makes a padded batch of B rows out of dataset items.

    An item is `{"row": index}` into `rows`, with `NO_ROW` for an empty place, or a raw row of a streamed dataset.

    Args:
        rows: where indices are looked up.
        encoder: makes tensors of a conversation.
        skip_bad_rows: a row that cannot be used after all is left out and counted; otherwise it raises `BadRow`.
        filler: index of a good row. It stands, with nothing to learn, in a batch that would have no row at all; when it
            has turned bad itself and bad rows are left out, another one does.
        skip_overlong: the same for rows longer than `max_length`, which a stream meets only here.
        positions: work out what the model would from tokens and grids, waiting for the GPU row by row; None leaves it to
            the model.
        in_bytes: leave pixels in bytes, for whoever moves the batch to the model's device (`Encoder.normalize_patches`).
    """

    def __init__(
        self,
        rows: Rows,
        encoder: Encoder,
        skip_bad_rows: bool = False,
        filler: int = 0,
        skip_overlong: bool = False,
        positions: Positions | None = None,
        in_bytes: bool = False,
    ) -> None:
        self.rows = rows
        self.encoder = encoder
        self.skip_bad_rows = skip_bad_rows
        self.filler = filler
        self.skip_overlong = skip_overlong
        self.positions = positions
        self.in_bytes = in_bytes

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch as `pad` makes it; under "stats" its `BatchStats`, and its "row_ids", as plain numbers.

        With `positions` also `position_ids` [3, B, T] and what `Positions.patch_inputs` knows of the images.
        """
        encoded = self.encode_all(items)
        rows = encoded or [self.filler_row(items)]
        batch: dict[str, Any] = pad(rows, self.encoder.pad_token_id, in_bytes=self.in_bytes)
        if self.positions is not None:
            by_row = [self.positions(row).T for row in rows]
            batch["position_ids"] = pad_sequence(by_row, batch_first=True).permute(2, 0, 1).contiguous()
            if "image_grid_thw" in batch:
                batch |= self.positions.patch_inputs(batch["image_grid_thw"])
        left_out = sum(item.get("row") != NO_ROW for item in items) - len(encoded)
        batch["stats"] = asdict(sum((row_stats(row) for row in encoded), BatchStats(skipped=left_out)))
        batch["row_ids"] = [row.row_id for row in encoded]
        return batch

    def encode_all(self, items: Sequence[dict[str, Any]], read_media: ReadMedia | None = None) -> list[Encoded]:
        """Encode the rows of these items that can be used."""
        return [row for item in items if (row := self._encode(item, read_media)) is not None]

    def _encode(self, item: dict[str, Any], read_media: ReadMedia | None) -> Encoded | None:
        if item.get("row") == NO_ROW:
            return None
        try:
            return self.rows.encode(item, self.encoder, read_media)
        except BadRow as error:
            skip = self.skip_overlong if isinstance(error, OverLongRow) else self.skip_bad_rows
            if not skip:
                raise
            logger.warning("skipped: %s", error)
            return None

    def filler_row(self, items: Sequence[dict[str, Any]], read_media: ReadMedia | None = None) -> Encoded:
        """Return a substitute for a batch without any usable row: a good row without targets."""
        if self.rows.streamed:
            raise BadRow(f"none of the {len(items)} rows of a batch of the stream can be used; see the warnings above")
        if not self.skip_bad_rows:
            return self.rows.encode({"row": self.filler}, self.encoder, read_media).without_labels()
        for index in [self.filler, *range(min(len(self.rows), _FILLERS_TRIED))]:
            # The one chosen by the scan may be what has become unreadable.
            with contextlib.suppress(BadRow):
                found = self.rows.encode({"row": index}, self.encoder, read_media).without_labels()
                self.filler = index
                return found
        raise BadRow(f"{self.rows.name}: its rows can be read no longer; see the warnings above")


def row_stats(row: Encoded) -> BatchStats:
    """Count the work that one row is for the model."""
    patches = row.image_grid_thw.prod(-1)
    return BatchStats(
        tokens=len(row.input_ids),
        tokens_squared=len(row.input_ids) ** 2,
        target_tokens=row.target_tokens,
        images=len(patches),
        patches=int(patches.sum()),
        patches_squared=int((patches**2).sum()),
        rows=1,
    )


def pad(
    rows: Sequence[Encoded], pad_token_id: int, side: str = "right", in_bytes: bool = False
) -> dict[str, torch.Tensor]:
    """Pad B encoded rows to the longest, T tokens, on the `side` given ("left" for generation).

    Returns `input_ids`, `attention_mask`, `mm_token_type_ids`, `labels` [B, T]; `pixel_values` [P, values of a patch]
    and `image_grid_thw` [I, 3] over all images, absent when there are none; with `in_bytes` see `model_inputs`.
    """

    def padded(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)

    batch = {
        "input_ids": padded([row.input_ids for row in rows], pad_token_id),
        "attention_mask": padded([torch.ones_like(row.input_ids) for row in rows], 0),
        "mm_token_type_ids": padded([row.mm_token_type_ids for row in rows], 0),
        "labels": padded([row.labels for row in rows], IGNORE_INDEX),
    }
    return batch | model_inputs([item for row in rows for item in row.media], in_bytes)
