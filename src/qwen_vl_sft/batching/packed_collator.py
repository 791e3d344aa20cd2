"""Packed micro-batches: rows one after another in one sequence, none of which sees another, prefixes computed once.

Rows of a group share their common prefix, up to the last image before the first answer; what a row has after it is a
branch. All rows that begin with the same text, as those with one system message do, can share this opening too, up to the
first image. Openings stand first in the sequence; then the prefixes, and the rows that share none; then all branches, so
that layers which carry a state compute both runs without reordering tokens. Every token keeps the position it has in its
own row, and attends to its own row alone: a branch to its opening, to its prefix and to itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import pad as pad_tensor

from qwen_vl_sft.batching.collator import Collator
from qwen_vl_sft.batching.packing import MicroBatch
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.data.encoding import Encoded
from qwen_vl_sft.data.feature_cache import FeatureCache
from qwen_vl_sft.data.labels import IGNORE_INDEX
from qwen_vl_sft.data.media import model_inputs, reading_once
from qwen_vl_sft.data.media.image import EncodedImage
from qwen_vl_sft.families.base import PackedLayout
from qwen_vl_sft.modeling.flops import BatchStats

MICRO_BATCHES = "micro_batches"
# The type that pixels in bytes are to become.
PIXEL_DTYPE = "pixel_dtype"


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one row of T tokens. It attends to the token ranges `before` of the sequence, and to itself."""

    row: Encoded
    positions: torch.Tensor
    start: int
    stop: int
    before: tuple[range, ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def reach(self) -> int:
        """Return how many tokens its last one attends to."""
        return len(self) + sum(map(len, self.before))


class PackedCollator:
    """Makes the packed micro-batches of one optimizer step.

    Args:
        rows: looks up and encodes single rows, with the recipe's rules for bad ones, their pixels in bytes or not.
        positions: M-RoPE positions of a row.
        dtype: of pixel values, that of the vision tower's input, and of features.
        features: batches bring what the vision tower made of their images before, and no pixels.
        share_prefixes: rows that come together in no group share their opening, if the family can.
    """

    def __init__(
        self,
        rows: Collator,
        positions: Positions,
        dtype: torch.dtype = torch.float32,
        features: FeatureCache | None = None,
        share_prefixes: bool = False,
    ) -> None:
        self.rows = rows
        self.positions = positions
        self.dtype = dtype
        self.features = features
        self.share_prefixes = share_prefixes

    def sharing(self, share_prefixes: bool) -> PackedCollator:
        """Return one that differs in this alone."""
        return PackedCollator(self.rows, self.positions, self.dtype, self.features, share_prefixes)

    def __call__(self, step: Sequence[MicroBatch]) -> dict[str, Any]:
        """Return the micro-batches of a step under `MICRO_BATCHES`, each as `join` makes it."""
        return {MICRO_BATCHES: [self._micro_batch(groups) for groups in step]}

    def _micro_batch(self, groups: MicroBatch) -> dict[str, Any]:
        # Questions on one image are mostly in one micro-batch; longer than that, decoded images are not kept.
        read_media = reading_once(self.features.read_image if self.features else self.rows.encoder.read_media)
        encoded = [self.rows.encode_all([{"row": row} for row in group], read_media) for group in groups]
        # Rows that share no prefix end first in the sequence, whose order the row ids have.
        encoded.sort(key=lambda group: len(group) > 1)
        filled = [group for group in encoded if group] or [[self.rows.filler_row([], read_media)]]
        share = self.share_prefixes and self.positions.family.shared_openings
        batch = join(filled, self.positions, self.rows.in_bytes, share)
        if self.features:
            # Also where no image is shown: the tower then runs in no batch.
            batch.setdefault("image_features", torch.zeros(0, self.features.width))
        for name in ("pixel_values", "image_features"):
            if name in batch and batch[name].is_floating_point():
                batch[name] = batch[name].to(self.dtype)
        if self.rows.in_bytes:
            batch[PIXEL_DTYPE] = self.dtype
        batch["row_ids"] = [row.row_id for group in encoded for row in group]
        if not any(encoded):
            batch["stats"] = asdict(BatchStats())
        batch["stats"]["skipped"] = sum(map(len, groups)) - sum(map(len, encoded))
        return batch


def join(
    groups: Sequence[Sequence[Encoded]], positions: Positions, in_bytes: bool = False, share_openings: bool = False
) -> dict[str, Any]:
    """Pack groups of rows with a common prefix into one sequence of T tokens and S pieces that show I different images.

    With `share_openings` groups that begin with the same text before their first image are computed on one copy of it.

    Returns `input_ids` [1, T]; `shift_labels` [1, N], the target tokens, and `logit_positions` [N], the positions that
    predict them; `position_ids` [3, 1, T], without a row of text positions, in which transformers would look for the
    beginnings of rows, waiting for the GPU; `cu_seq_lens_q`, `cu_seq_lens_k` [S + 1] int32, the boundaries of the pieces
    and of what they attend to; their largest lengths `max_length_q`, `max_length_k`; `kv_index` [K], for prefixes that
    are shared, the keys and values of each piece one after another; what the images bring (`_vision_inputs`) and what
    the model's family adds (`ModelFamily.packed_entries`); and `stats`, a `BatchStats` as a dictionary. There is no
    attention mask.
    """
    pieces = _pieces(groups, positions, share_openings)
    lengths = [len(piece) for piece in pieces]
    reach = [piece.reach for piece in pieces]
    starts = [0, *itertools.accumulate(lengths)]
    batch: dict[str, Any] = {
        "input_ids": torch.cat([piece.row.input_ids[piece.start : piece.stop] for piece in pieces])[None],
        **_targets(torch.cat([_labels(piece) for piece in pieces])),
        "position_ids": torch.cat([piece.positions[:, piece.start : piece.stop] for piece in pieces], dim=1)[:, None],
        "cu_seq_lens_q": _boundaries(lengths),
        "cu_seq_lens_k": _boundaries(reach),
        "max_length_q": max(lengths),
        "max_length_k": max(reach),
    }
    if lengths != reach:
        runs = [
            run
            for piece, start in zip(pieces, starts, strict=False)
            for run in (*piece.before, range(start, start + len(piece)))
        ]
        batch["kv_index"] = torch.cat([torch.arange(run.start, run.stop) for run in runs])
    shown = [image for piece in pieces for image in _images(piece)]
    if shown:
        batch |= _vision_inputs(shown, positions, in_bytes)
    merged = sum(int(image.grid.prod()) for image in shown) // positions.config.vision_config.spatial_merge_size**2
    visual = torch.cat([piece.row.mm_token_type_ids[piece.start : piece.stop] for piece in pieces]).nonzero()[:, 0]
    assert len(visual) == merged, f"{len(visual)} image tokens for {merged} merged patches"
    by_start = {start: number for number, start in enumerate(starts[:-1])}
    parents = [by_start[piece.before[-1].start] if piece.before else None for piece in pieces]
    batch |= positions.packed_entries(PackedLayout(lengths, parents, visual))
    batch["stats"] = asdict(_stats(groups, pieces, shown, batch))
    return batch


def _vision_inputs(shown: Sequence[EncodedImage], positions: Positions, in_bytes: bool) -> dict[str, Any]:
    """Return the model inputs of the images, in order of appearance.

    Returns `pixel_values` and `image_grid_thw` as in a padded batch, each different image once, with what
    `Positions.patch_inputs` knows of them, and `image_index`, for each image shown which of the different ones it is,
    when an image is shown twice. Images that bring features give `image_features` [image tokens, values] alone.
    """
    if shown[0].features is not None:
        return {"image_features": torch.cat([image.features for image in shown if image.features is not None])}
    different = {image.content_hash: image for image in shown}
    found: dict[str, Any] = model_inputs([*different.values()], in_bytes)
    found |= positions.patch_inputs(found["image_grid_thw"])
    if len(different) < len(shown):
        numbers = {content_hash: number for number, content_hash in enumerate(different)}
        found["image_index"] = [numbers[image.content_hash] for image in shown]
    return found


def prefix_length(row: Encoded) -> int:
    """Return where the part ends that rows on the same images can share: after the last image before any answer."""
    image = row.mm_token_type_ids.bool()
    learned = (row.labels != IGNORE_INDEX).nonzero()
    if len(learned):
        image[int(learned[0]) :] = False
    found = image.nonzero()
    # An image is closed by one more token; the tokenizer never merges text into it.
    return int(found[-1]) + 2 if len(found) else 0


def opening_length(row: Encoded) -> int:
    """Return where the text ends that rows can share whatever their images are: before the first, before any answer."""
    image = row.mm_token_type_ids[: prefix_length(row)].nonzero()
    return int(image[0]) if len(image) else 0


def _pieces(groups: Sequence[Sequence[Encoded]], positions: Positions, share_openings: bool) -> list[Piece]:
    """Return the openings, then the prefixes, and the rows that share none, then the branches."""
    places = [positions(group[0]) for group in groups]
    begins = [opening_length(group[0]) if share_openings else 0 for group in groups]
    texts = [tuple(group[0].input_ids[:begin].tolist()) for group, begin in zip(groups, begins, strict=True)]
    openings: list[Piece] = []
    roots: list[Piece] = []
    branches: list[Piece] = []
    total = 0
    opened: dict[tuple[int, ...], range] = {}
    for group, own, text in zip(groups, places, texts, strict=True):
        if text and text not in opened and texts.count(text) > 1:
            openings.append(Piece(group[0], own, 0, len(text)))
            opened[text] = range(total, total + len(text))
            total += len(text)
    for group, own, text in zip(groups, places, texts, strict=True):
        first = group[0]
        shared = prefix_length(first) if len(group) > 1 else 0
        assert shared or len(group) == 1, "rows of a group share a prefix"
        before: tuple[range, ...] = (opened[text],) if text in opened else ()
        begin = sum(map(len, before))
        assert bool((first.labels[: begin + 1] == IGNORE_INDEX).all()), "nothing is learned in an opening"
        roots.append(Piece(first, own, begin, shared or len(first.input_ids), before))
        if shared:
            before += (range(total, total + len(roots[-1])),)
            for row in group:
                assert torch.equal(row.input_ids[:shared], first.input_ids[:shared]), "rows of a group begin alike"
                assert bool((row.labels[: shared + 1] == IGNORE_INDEX).all()), "nothing is learned in a prefix"
                branches.append(Piece(row, own if row is first else positions(row), shared, len(row.input_ids), before))
        total += len(roots[-1])
    return openings + roots + branches


def _labels(piece: Piece) -> torch.Tensor:
    labels = piece.row.labels[piece.start : piece.stop].clone()
    labels[0] = IGNORE_INDEX  # what stands before it in the sequence may be of another row
    return labels


def _targets(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the targets of `labels` [T] and the positions that predict them; one of each, ignored, where there is none."""
    positions = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]
    if not len(positions):
        positions = torch.zeros(1, dtype=torch.long)
    return {"shift_labels": labels[positions + 1][None], "logit_positions": positions}


def _images(piece: Piece) -> tuple[EncodedImage, ...]:
    """Return the images that begin inside a piece."""
    row = piece.row
    if not row.media:
        return ()
    image = row.mm_token_type_ids.bool()
    begins = image & ~pad_tensor(image[:-1], (1, 0))
    assert int(begins.sum()) == len(row.media), f"images without a boundary among {len(image)} tokens"
    return row.media[int(begins[: piece.start].sum()) : int(begins[: piece.stop].sum())]


def _boundaries(lengths: Sequence[int]) -> torch.Tensor:
    return pad_tensor(torch.tensor(lengths).cumsum(0), (1, 0)).int()


def _stats(
    groups: Sequence[Sequence[Encoded]], pieces: Sequence[Piece], shown: Sequence[EncodedImage], batch: dict[str, Any]
) -> BatchStats:
    """Count what the model computes: a shared prefix once, an image once, and nothing for images that bring features."""
    patches = batch["image_grid_thw"].prod(-1) if "image_grid_thw" in batch else torch.zeros(0, dtype=torch.long)
    return BatchStats(
        tokens=sum(len(piece) for piece in pieces),
        # A piece of n tokens after p others attends to n * p + n * n / 2 of them, a row of n tokens to n * n / 2.
        tokens_squared=sum(len(piece) * (2 * piece.reach - len(piece)) for piece in pieces),
        target_tokens=int((batch["shift_labels"] != IGNORE_INDEX).sum()),
        images=len({image.content_hash for image in shown}),
        patches=int(patches.sum()),
        patches_squared=int((patches**2).sum()),
        rows=sum(len(group) for group in groups),
    )
