"""From a resolved run to checked data: processor, encoder, rows that are known to be good, and the plan of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from qwen_vl_sft.batching.fit import problems_of_lengths
from qwen_vl_sft.batching.packing import StepPlan
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.config.settings import DataSettings
from qwen_vl_sft.data.agreed_scan import agreed_scan
from qwen_vl_sft.data.dataset import Rows, in_memory, open_split, select_evenly
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.scan import Scan, scan
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import raise_all
from qwen_vl_sft.modeling.base_model import load_family, load_processor
from qwen_vl_sft.planning.find_rows import remember_sizes
from qwen_vl_sft.planning.rows import measured_sizes
from qwen_vl_sft.training.image_features import ImageFeatures, plan_features
from qwen_vl_sft.training.resolve import Run


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and evaluates on.

    Args:
        encoder: makes tensors of conversations.
        train: checked rows, or a stream that is checked as it comes.
        evaluation: checked rows, None when nothing is evaluated.
        features: the image features that are kept on disk, None for none.
        step_plan: which rows are packed together, None for padded batches.
        steps: optimizer steps of the whole run.
    """

    encoder: Encoder
    train: Scan | Rows
    evaluation: Scan | None
    features: ImageFeatures | None
    step_plan: StepPlan | None
    steps: int

    def summary(self) -> dict[str, Any]:
        """Return names, counts and fingerprints for the run's files."""
        found: dict[str, Any] = {}
        for name, part in (("train", self.train), ("evaluation", self.evaluation)):
            if part is None:
                continue
            rows = part.rows if isinstance(part, Scan) else part
            about: dict[str, Any] = {"source": rows.name} | ({"commit": rows.commit} if rows.commit else {})
            if isinstance(part, Scan):
                found[name] = about | {"fingerprint": rows.dataset._fingerprint, **part.summary()}
            else:
                found[name] = about | {"streamed": True}
        return found


def prepare_data(run: Run) -> PreparedData:
    """Open and check the rows, and plan the steps. Raises `UserError` for everything that cannot be trained on.

    Call it on all processes.
    """
    recipe, context, data = run.recipe, run.context, run.recipe.data
    processor = load_processor(recipe.model, data.min_pixels, data.max_pixels)
    # One process of a machine downloads and prepares; the others then read its caches.
    with launch.join(context, recipe.get("ddp_backend")).local_main_process_first():
        train_rows, evaluation_rows = open_rows_of(recipe)
    encoder = build_encoder(recipe, processor, train_rows)
    content_hashes = recipe.run.cache_image_features is not None
    train = train_rows if train_rows.streamed else _scan(data, context, train_rows, encoder, content_hashes)
    evaluation = _scan(data, context, evaluation_rows, encoder) if evaluation_rows else None
    if not isinstance(train, Scan):
        assert recipe.get("max_steps") > 0, "recipe rules require max_steps for a stream"
        return PreparedData(encoder, train, evaluation, None, None, recipe.get("max_steps"))
    raise_all([*problems_of_lengths(train.rows, train.lengths, recipe.run, context.processes)])
    if context.rank == 0:
        remember_sizes(data, str(recipe.model.model_name_or_path), measured_sizes(train.lengths))
    features = plan_features(recipe, run.structure, train, encoder)
    return PreparedData(encoder, train, evaluation, features, *_plan_steps(run, train, features is not None))


def open_rows_of(recipe: Recipe) -> tuple[Rows, Rows | None]:
    """Open the training rows, and those that are evaluated on while training, if any. Raises `UserError`."""
    data = recipe.data
    seed = recipe.data_seed if data.shuffle_dataset else None
    train = open_split(data, data.dataset_train_split, shuffle_seed=seed, max_rows=data.max_train_samples)
    if recipe.get("eval_strategy") == "no":
        return train, None
    split, cap = data.dataset_test_split, data.max_eval_samples
    assert split is not None, "recipe rules require dataset_test_split for evaluations"
    if data.dataset_streaming:
        return train, in_memory(open_split(data, split, max_rows=cap))
    return train, select_evenly(open_split(data, split), cap)


def build_encoder(recipe: Recipe, processor: Any, train_rows: Rows) -> Encoder:
    """Return what makes tensors of the rows of a run."""
    data = recipe.data
    message = train_rows.format.resolve_system_message(data.system_message)
    chat = load_family(recipe.model).chat_with(data.enable_thinking)
    return Encoder(processor, message, data.train_on, data.max_length, chat)


def with_train_rows(run: Run, data: PreparedData, train: Scan) -> PreparedData:
    """Return the same data with other training rows, and without evaluation."""
    plan, steps = _plan_steps(run, train, data.features is not None)
    return replace(data, train=train, evaluation=None, step_plan=plan, steps=steps)


def _plan_steps(run: Run, train: Scan, has_features: bool) -> tuple[StepPlan | None, int]:
    """Plan which rows are packed together, and count the optimizer steps of the whole run."""
    recipe, batch = run.recipe, run.global_batch
    steps = recipe.get("max_steps")
    if steps <= 0:
        steps = math.ceil(recipe.get("num_train_epochs") * batch.steps(train.lengths.tokens))
    if not recipe.run.packing:
        return None, steps
    # Where the vision tower does not run, nobody waits for another's large images.
    sizes = train.lengths.without_patches() if has_features else train.lengths
    if not load_family(recipe.model).shared_openings:
        sizes = sizes.without_opening()
    budget, share = recipe.run.tokens_per_batch, recipe.run.share_prefixes
    return StepPlan(sizes, batch, budget, run.context.processes, recipe.data_seed, share), steps


def _scan(
    data: DataSettings, context: DistributedContext, rows: Rows, encoder: Encoder, content_hashes: bool = False
) -> Scan:
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
            content_hashes=content_hashes,
        ),
    )
