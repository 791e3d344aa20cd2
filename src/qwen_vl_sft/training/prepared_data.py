"""From a recipe to checked data: processor, encoder, and rows that are known to be good."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qwen_vl_sft.batching.global_batch import GlobalBatch
from qwen_vl_sft.batching.packing import StepPlan
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.data.agreed_scan import agreed_scan
from qwen_vl_sft.data.dataset import ROW_ID, Rows, in_memory, open_rows, spread
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.rows import resolve_system_message
from qwen_vl_sft.data.scan import Scan, scan
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.launch import DistributedContext
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.modeling.base_model import load_processor
from qwen_vl_sft.training.image_features import ImageFeatures, plan_features


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and evaluates on. `train` is checked (`Scan`), or a stream that is checked as it comes.

    `features`: what is kept on disk of the training rows' images.
    """

    encoder: Encoder
    train: Scan | Rows
    evaluation: Scan | None
    features: ImageFeatures | None = None

    def steps(self, recipe: Recipe, global_batch: GlobalBatch) -> int:
        """Optimizer steps of the whole run."""
        if recipe.get("max_steps") > 0:
            return recipe.get("max_steps")
        assert isinstance(self.train, Scan), "recipe rules require max_steps for a stream"
        return math.ceil(recipe.get("num_train_epochs") * global_batch.steps(self.train.tokens))

    def summary(self) -> dict[str, Any]:
        """Names, counts and fingerprints for the run's files."""
        found: dict[str, Any] = {}
        for name, part in (("train", self.train), ("evaluation", self.evaluation)):
            if isinstance(part, Scan):
                rows = part.rows
                found[name] = {"source": rows.name, "fingerprint": rows.dataset._fingerprint, **part.summary()}
            elif part is not None:
                found[name] = {"source": part.name, "streamed": True}
        return found


def prepare_data(recipe: Recipe, context: DistributedContext) -> PreparedData:
    """Open and check the rows. Raises `UserError` for everything that cannot be trained on."""
    data = recipe.data
    processor = load_processor(recipe.model, data.min_pixels, data.max_pixels)
    # One process of a machine downloads and prepares; the others then read its caches.
    with launch.join(context, recipe.get("ddp_backend")).local_main_process_first():
        train_rows = _open(recipe, data.dataset_train_split, data.max_train_samples, shuffle=data.shuffle_dataset)
        evaluation_rows = _evaluation_rows(recipe) if recipe.get("eval_strategy") != "no" else None
    message = resolve_system_message(data.system_message, train_rows.format)
    encoder = Encoder(processor, message, data.train_on, data.max_length)
    image_keys = recipe.run.cache_image_features is not None
    train = train_rows if train_rows.streamed else _scan(recipe, context, train_rows, encoder, image_keys)
    evaluation = _scan(recipe, context, evaluation_rows, encoder) if evaluation_rows else None
    if recipe.run.packing:
        assert isinstance(train, Scan), "recipe rules refuse packing of a stream"
        _check_rows_fit(train, recipe.run.tokens_per_batch)
        if recipe.run.global_batch_tokens is not None:
            _check_steps_hold_rows(train, recipe.run.global_batch_tokens, context.processes)
    features = plan_features(recipe, train, encoder) if isinstance(train, Scan) else None
    return PreparedData(encoder, train, evaluation, features)


def _check_rows_fit(train: Scan, tokens_per_batch: int) -> None:
    longer = int((train.tokens > tokens_per_batch).sum())
    if longer:
        row = train.rows.where(train.rows.dataset[int(train.tokens.argmax())][ROW_ID])  # type: ignore[index]
        raise UserError(
            f"tokens_per_batch {tokens_per_batch:,}: {longer:,} of {len(train.rows):,} rows are longer, the longest"
            f" ({row}) with {int(train.tokens.max()):,} tokens; raise tokens_per_batch, lower max_pixels, or leave them"
            f" out with max_length: {tokens_per_batch} and overlong: drop"
        )


def _check_steps_hold_rows(train: Scan, tokens: int, processes: int) -> None:
    """Every step must have a row for each process, and two at least: else some would have none."""
    longest, rows = int(train.tokens.max()), max(2, processes)
    if tokens < rows * longest:
        why = f"for {processes:,} processes" if processes > 2 else "so that no step is empty"
        raise UserError(
            f"global_batch_tokens {tokens:,}: the longest row has {longest:,} tokens, and a step must have room for"
            f" {rows:,} such rows {why}; write {rows * longest:,} or more, or lower max_pixels"
        )


def step_plan(recipe: Recipe, context: DistributedContext, data: PreparedData, global_batch: GlobalBatch) -> StepPlan:
    """Which rows a packed run trains on together."""
    assert isinstance(data.train, Scan), "recipe rules refuse packing of a stream"
    run = recipe.run
    budget, share = run.tokens_per_batch, run.share_prefixes
    # Where the vision tower does not run, nobody waits for another's large images.
    sizes = data.train.sizes.without_patches() if data.features else data.train.sizes
    return StepPlan(sizes, global_batch, budget, context.processes, recipe.data_seed, share)


def _open(recipe: Recipe, split: str, max_rows: int | None, shuffle: bool) -> Rows:
    data = recipe.data
    assert data.dataset_name is not None
    return open_rows(
        data.dataset_name,
        split,
        data.dataset_config,
        data.dataset_streaming,
        data.dataset_format,
        shuffle_seed=recipe.data_seed if shuffle else None,
        max_rows=max_rows,
    )


def _evaluation_rows(recipe: Recipe) -> Rows:
    split, cap = recipe.data.dataset_test_split, recipe.data.max_eval_samples
    assert split is not None
    if recipe.data.dataset_streaming:
        return in_memory(_open(recipe, split, cap, shuffle=False))
    return spread(_open(recipe, split, None, shuffle=False), cap)


def _scan(recipe: Recipe, context: DistributedContext, rows: Rows, encoder: Encoder, image_keys: bool = False) -> Scan:
    data = recipe.data
    return agreed_scan(
        context,
        rows,
        lambda: scan(
            rows,
            encoder,
            data.verify_images,
            skip_bad_rows=data.bad_rows == "skip",
            drop_overlong=data.overlong == "drop",
            num_proc=data.dataset_num_proc,
            image_keys=image_keys,
        ),
    )
