"""Look at the data of a recipe: every row is checked, and what its splits hold is counted and compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen_vl_sft.batching.global_batch import resolve_batch
from qwen_vl_sft.config.range_rules import RANGE_RULES
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.data.dataset import in_memory
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.row_checks import Checks, check_rows
from qwen_vl_sft.errors import raise_all
from qwen_vl_sft.modeling.base_model import load_family, load_processor
from qwen_vl_sft.planning.find_rows import remember_sizes
from qwen_vl_sft.planning.rows import measured_sizes
from qwen_vl_sft.previewing.checked_split import CheckedSplit
from qwen_vl_sft.previewing.findings import Finding, notes_of, notes_of_equal_rows, problems_of
from qwen_vl_sft.previewing.statistics import (
    Batches,
    ImageSizes,
    Overlap,
    PixelLimit,
    find_overlap,
    pixel_limits,
    ways_to_batch,
)
from qwen_vl_sft.previewing.summary import SplitSummary, identities_of, summarise
from qwen_vl_sft.training.prepared_data import build_encoder, open_rows_of
from qwen_vl_sft.training.second_stage import with_init_adapter


@dataclass(frozen=True)
class Inspection:
    """The data of a recipe: what would make training fail, what else was found, and the numbers.

    Args:
        recipe: the settings.
        encoder: reads rows as training does.
        splits: the checked splits, training first.
        summaries: one of each.
        overlap: of evaluation and training rows; None without evaluation.
        batches: ways to batch the training rows.
        limits: of pixels, on training rows.
        problems: what would make training fail.
        notes: what else should be looked at.
    """

    recipe: Recipe
    encoder: Encoder
    splits: tuple[CheckedSplit, ...]
    summaries: tuple[SplitSummary, ...]
    overlap: Overlap | None
    batches: tuple[Batches, ...]
    limits: tuple[PixelLimit, ...]
    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]


def inspect(recipe: Recipe) -> Inspection:
    """Check every row of a recipe's data. Raises `UserError` for data or a model that cannot be opened."""
    recipe = with_init_adapter(recipe)
    needed = {"model_name_or_path": recipe.model.model_name_or_path, "dataset_name": recipe.data.dataset_name}
    missing = [
        f"{name} is missing: set it in the recipe, or as --{name}" for name, value in needed.items() if not value
    ]
    if recipe.get("eval_strategy") != "no" and not recipe.data.dataset_test_split:
        missing.append("eval_strategy is set but dataset_test_split is not: name the split, or set eval_strategy: no")
    if recipe.data.dataset_streaming and recipe.data.max_train_samples is None:
        missing.append("dataset_streaming: say how much of the stream to read, such as --max_train_samples 1000")
    raise_all([*missing, *(problem for rule in RANGE_RULES for problem in rule(recipe, None))])
    processor = load_processor(recipe.model, recipe.data.min_pixels, recipe.data.max_pixels)
    opened = [in_memory(rows) if rows.streamed else rows for rows in open_rows_of(recipe) if rows is not None]
    encoder = build_encoder(recipe, processor, opened[0])
    data, merge = recipe.data, int(processor.image_processor.merge_size) ** 2
    checks = Checks(encoder, data.verify_images, content_hashes=True)
    splits = tuple(
        CheckedSplit(name, rows, check_rows(rows, checks, data.dataset_num_proc), merge)
        for name, rows in zip(("train", "evaluation"), opened, strict=False)
    )
    train = splits[0]
    identities = [identities_of(split.usable) for split in splits]
    overlap = find_overlap(identities[0], identities[1]) if len(identities) > 1 else None
    summaries = tuple(summarise(split, known) for split, known in zip(splits, identities, strict=True))
    if train.is_good.any() and not recipe.data.dataset_streaming:
        remember_sizes(data, str(recipe.model.model_name_or_path), measured_sizes(train.lengths))
    return Inspection(
        recipe,
        encoder,
        splits,
        summaries,
        overlap,
        tuple(_batches(recipe, train)),
        tuple(_limits(recipe, train, processor.image_processor)),
        tuple(finding for split in splits for finding in problems_of(recipe, split)),
        (
            *(finding for split in splits for finding in notes_of(recipe, split, processor.image_processor)),
            *notes_of_equal_rows(summaries, overlap),
        ),
    )


def _batches(recipe: Recipe, train: CheckedSplit) -> list[Batches]:
    if not train.is_good.any():
        return []
    rows, batch = recipe.get("per_device_train_batch_size"), resolve_batch(recipe, 1)
    shared = load_family(recipe.model).shared_openings
    lengths = train.lengths if shared else train.lengths.without_opening()
    return ways_to_batch(lengths, rows, batch, recipe.run.tokens_per_batch, recipe.data_seed)


def _limits(recipe: Recipe, train: CheckedSplit, image_processor: Any) -> list[PixelLimit]:
    measured, images = train.measured, train.images
    text_tokens = np.asarray(measured["tokens"]) - train.image_tokens(measured)
    size = image_processor.size
    factor = image_processor.patch_size * image_processor.merge_size
    found = ImageSizes(images.sides, images.row, text_tokens)
    return pixel_limits(found, factor, size["shortest_edge"], size["longest_edge"], most_tokens(recipe))


def most_tokens(recipe: Recipe) -> int | None:
    """Return the most tokens that a row may have, None for any number."""
    known = [recipe.data.max_length, recipe.run.tokens_per_batch if recipe.run.packing else None]
    return min((value for value in known if value is not None), default=None)
