"""The plan of a run: whether it fits on a GPU, how long it takes, what it writes, and which changes would help most."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from qwen_vl_sft.config.batch_rules import BATCH_RULES
from qwen_vl_sft.config.model_rules import IDLE_RULES, MODEL_RULES
from qwen_vl_sft.config.range_rules import RANGE_RULES
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.config.settings import GROUPS
from qwen_vl_sft.errors import raise_all
from qwen_vl_sft.families.shape import ModelShape, Work
from qwen_vl_sft.planning.cards import Card
from qwen_vl_sft.planning.inputs import Launch
from qwen_vl_sft.planning.memory import MARGIN, BatchSizes, MemorySplit, keep_as_many, memory_of
from qwen_vl_sft.planning.rows import RowSizes
from qwen_vl_sft.planning.speed import StepTime, step_time
from qwen_vl_sft.planning.training_setup import ADAM_BYTES, OPTIMIZER_BYTES, Training, layers_named

KERNELS_OF_AUTO = ("rms_norm", "swiglu", "rope", "quick_gelu", "patch_embed", "linear_attention", "lora")
# A packed micro-batch is so full on average, and rows of a padded one fill so much of the longest.
_FILLED = 0.9
_FEATURE_BYTES = {"bfloat16": 2, "int8": 1, "float32": 4}
_MOST_TOKENS = 1 << 20
_RULES = (*RANGE_RULES, *BATCH_RULES, *MODEL_RULES)


def _kernels_of_auto() -> tuple[str, ...]:
    """Return what "auto" is expected to take; of an extra that few models need, what is installed."""
    return tuple(name for name in KERNELS_OF_AUTO if name != "linear_attention" or importlib.util.find_spec("fla"))


@dataclass(frozen=True)
class RunPlan:
    """A run as its recipe and launch make it, on some GPU. Everything is worked out when it is asked for.

    Args:
        recipe: the settings.
        shape: the model.
        rows: sizes of its training rows.
        card: the GPU.
        launch: strategy and number of GPUs.
        flash: FlashAttention 3 or 4 is installed and runs on the card.
    """

    recipe: Recipe
    shape: ModelShape
    rows: RowSizes
    card: Card
    launch: Launch
    flash: bool = False

    @cached_property
    def training(self) -> Training:
        """Return what decides on memory and time."""
        model, run, recipe = self.recipe.model, self.recipe.run, self.recipe
        whole = {"all": ("vision", "merger", "language"), "experts": ("language",)}
        parts = whole.get(model.lora_scope, (model.lora_scope,))
        adapted = layers_named(self.shape, model.lora_target_modules, parts) if model.use_peft else None
        wanted = _kernels_of_auto() if model.fused_kernels == "auto" else tuple(model.fused_kernels or ())
        optim = str(recipe.get("optim"))
        return Training(
            self.shape,
            bits=4
            if model.load_in_4bit
            else 8
            if model.load_in_8bit or model.load_in_fp8
            else 32
            if model.dtype == "float32"
            else 16,
            nested=model.use_bnb_nested_quant,
            fp8=bool(model.load_in_fp8),
            fp8_gradients=bool(model.fp8_gradients),
            stored=4 if model.dtype == "float32" else 2,
            mixed=bool(recipe.mixed_precision),
            adapted=adapted,
            adapts_experts=model.use_peft and model.lora_scope == "experts",
            train_router=model.train_router,
            rank=model.lora_r,
            dropout=model.lora_dropout > 0,
            in_full=self._in_full(),
            freeze_vision=model.freeze_vision_tower,
            kernels=frozenset(wanted) - self.shape.unfit_kernels,
            packing=run.packing,
            cached_features=run.cache_image_features is not None and run.packing,
            flash_attention=self.flash or model.attn_implementation in ("flash_attention_3", "flash_attention_4"),
            optimizer=OPTIMIZER_BYTES.get(optim, ADAM_BYTES),
            strategy=self.launch.strategy,
            processes=self.launch.processes,
        )

    def _in_full(self) -> int:
        """Count the weights of `lora_modules_to_save`, as far as they are the embeddings, the head or linear layers."""
        count = 0
        for name in self.recipe.model.lora_modules_to_save or ():
            if name.endswith(("embed_tokens", "lm_head")):
                count += self.shape.embedding_weights
            count += sum(linear.weights for linear in layers_named(self.shape, [name], ()))
        return count

    @property
    def rows_per_step(self) -> float:
        """Return the rows of an optimizer step over all GPUs."""
        run, recipe = self.recipe.run, self.recipe
        if run.global_batch_tokens:
            return max(1.0, run.global_batch_tokens / self.rows.tokens)
        if run.global_batch_size:
            return float(min(run.global_batch_size, self.rows.rows))
        per_device = recipe.get("per_device_train_batch_size") * recipe.get("gradient_accumulation_steps")
        return float(min(per_device * self.launch.processes, self.rows.rows))

    @property
    def _prefix_share(self) -> float:
        """Return the share of the tokens that are computed where rows share their prefix, but no opening."""
        run = self.recipe.run
        return self.rows.computed if run.packing and run.share_prefixes else 1.0

    @property
    def _opening(self) -> int:
        """Return the tokens that each micro-batch computes once; 0 where no opening is shared."""
        run = self.recipe.run
        return self.rows.opening if run.packing and run.share_prefixes and self.shape.shared_openings else 0

    @property
    def _spared_openings(self) -> float:
        """Return how many openings a GPU does not compute in a step: all but one of each micro-batch."""
        groups = self.rows_per_step * self.rows.groups / self.launch.processes
        return max(0.0, groups - self.micro_batches) if self._opening else 0.0

    @property
    def computed_share(self) -> float:
        """Return the share of the tokens that are computed: fewer where rows share their prefix or their opening."""
        tokens = self.rows_per_step * self.rows.tokens / self.launch.processes
        return self._prefix_share - self._opening * self._spared_openings / tokens

    @property
    def micro_batches(self) -> int:
        """Return the micro-batches of a step on each GPU."""
        if not self.recipe.run.packing:
            rows = self.recipe.get("per_device_train_batch_size")
            return max(1, math.ceil(self.rows_per_step / self.launch.processes / rows))
        rows, opening = self.rows, self._opening
        tokens = self.rows_per_step * (rows.tokens * self._prefix_share - opening * rows.groups) / self.launch.processes
        return max(1, math.ceil(tokens / max(1.0, self.recipe.run.tokens_per_batch * _FILLED - opening)))

    def largest(self) -> BatchSizes:
        """Return the micro-batch that is tried before the first step: full, as far as a step has rows for it."""
        rows, run = self.rows, self.recipe.run
        if run.packing:
            tokens = min(run.tokens_per_batch, max(self.rows_per_step * self.computed_share, 1.0) * rows.longest)
            count = tokens / (rows.tokens * self.computed_share)
            patches = count * rows.patches * self._prefix_share
        else:
            count = self.recipe.get("per_device_train_batch_size")
            tokens, patches = count * rows.longest, count * rows.patches * rows.longest / rows.tokens
        if run.packing and self.computed_share < 1:
            # What shares a prefix is nearly all image.
            patches = min(tokens * 4, patches)
        return BatchSizes(tokens, count * rows.target_tokens, patches)

    @property
    def work(self) -> Work:
        """Return what a GPU computes in a step, on average."""
        rows, share, spared = self.rows, self._prefix_share, self._spared_openings
        count = self.rows_per_step / self.launch.processes
        padded = 1.0 if self.recipe.run.packing else min(1.0 / _FILLED, rows.longest / rows.tokens)
        return Work(
            tokens=count * rows.tokens * self.computed_share * padded,
            # Other tokens attend to an opening as before.
            tokens_squared=count * rows.tokens_squared * share * padded - self._opening**2 * spared,
            target_tokens=count * rows.target_tokens,
            patches=count * rows.patches * share,
            patches_squared=count * rows.patches_squared * share,
        )

    @property
    def room(self) -> float:
        """Return the bytes that tensors may take: the card's, less the margin."""
        return self.card.room * (1 - MARGIN)

    @cached_property
    def checkpointed(self) -> int:
        """Return how many layers are checkpointed; under ZeRO-3 and where "auto" finds no room all of them."""
        wanted = self.recipe.run.gradient_checkpointing
        if wanted == "auto" and self.launch.strategy != "zero3":
            return keep_as_many(self.training, self.largest(), self.room)
        return 0 if wanted is False else self.training.blocks

    @cached_property
    def memory(self) -> MemorySplit:
        """Return the memory of a GPU, by what takes it."""
        training = replace(self.training, accumulates=self.micro_batches > 1)
        return memory_of(training, self.largest(), self.checkpointed)

    @property
    def fits(self) -> bool:
        """Return whether it does, with the margin."""
        return self.memory.total <= self.room

    def fitting_tokens(self, checkpointed: int) -> int:
        """Return the largest `tokens_per_batch` that fits with so many layers checkpointed, in steps of 256; 0 for none.

        For padded batches these are the tokens of a whole batch.
        """
        per_token = self._per_token()

        def total(tokens: int) -> float:
            batch = BatchSizes(tokens, tokens * per_token.target_tokens, tokens * per_token.patches)
            return memory_of(self.training, batch, checkpointed).total

        low, high = 0, _MOST_TOKENS // 256
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if total(middle * 256) <= self.room else (low, middle - 1)
        return low * 256

    def _per_token(self) -> BatchSizes:
        batch = self.largest()
        return BatchSizes(1.0, batch.target_tokens / batch.tokens, batch.patches / batch.tokens)

    @cached_property
    def step(self) -> StepTime:
        """Return the time and the FLOPs of a step on each GPU."""
        return step_time(self.training, self.card, self.work, self.micro_batches, self.checkpointed)

    @property
    def steps(self) -> int:
        """Return the optimizer steps of the run."""
        stated = self.recipe.get("max_steps")
        if stated > 0:
            return int(stated)
        epoch = math.ceil(self.rows.rows / self.rows_per_step)
        return max(1, math.ceil(self.recipe.get("num_train_epochs") * epoch))

    @property
    def hours(self) -> float:
        """Return the hours of all steps, without evaluations, saving and the start."""
        return self.steps * self.step.seconds / 3600

    @property
    def tokens(self) -> float:
        """Return the tokens that the run trains on."""
        return self.steps * self.rows_per_step * self.rows.tokens

    @property
    def flops(self) -> float:
        """Return the FLOPs of the run on all GPUs, recomputation included."""
        return self.steps * self.step.computed_flops * self.launch.processes

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens that all GPUs train on in a second."""
        return self.rows_per_step * self.rows.tokens / self.step.seconds

    def disk(self) -> dict[str, float]:
        """Return the bytes that the run writes: a checkpoint, all that are kept, the finished model, kept features."""
        training = self.training
        saved = training.trained_weights * 4
        state = 0.0 if self.recipe.get("save_only_model") else training.trained_weights * training.optimizer
        one = saved + state
        final = float(saved)
        if training.full:
            final = sum(self.shape.parameters.values()) * (4 if self.recipe.model.dtype == "float32" else 2)
        features = 0.0
        if training.cached_features:
            images = self.rows.rows * self.rows.images * self.rows.distinct_images
            tokens = self.rows.patches / max(self.rows.images, 1e-9) / self.shape.vision.merge**2
            width = self.shape.text.hidden * self.shape.vision.mergers
            each = _FEATURE_BYTES[str(self.recipe.run.cache_image_features)]
            features = images * tokens * width * each
        return {"checkpoint": one, "checkpoints": one * self._kept(), "model": final, "features": features}

    def _kept(self) -> int:
        recipe = self.recipe
        if recipe.get("save_strategy") == "no":
            return 0
        every = recipe.get("save_steps")
        every = max(1, math.ceil(every * self.steps)) if every < 1 else every
        made = math.ceil(recipe.get("num_train_epochs")) if recipe.get("save_strategy") == "epoch" else 0
        made = made or max(1, math.ceil(self.steps / every))
        return min(made, recipe.get("save_total_limit") or made)

    def changed(self, launch: Launch | None = None, rows: RowSizes | None = None, **keys: Any) -> RunPlan:
        """Return the plan with other values of some recipe keys."""
        recipe, sections = self.recipe, {}
        for section, group in zip(("data", "model", "run"), GROUPS.values(), strict=True):
            names = {entry.name for entry in fields(group)} & keys.keys()
            if names:
                sections[section] = replace(getattr(recipe, section), **{name: keys.pop(name) for name in names})
        training = MappingProxyType({**recipe.training, **keys})
        recipe = replace(recipe, training=training, **sections)
        return replace(self, recipe=recipe, launch=launch or self.launch, rows=rows or self.rows)


def check_launch(plan: RunPlan) -> None:
    """Raise `UserError` with everything that training would refuse and a plan must not promise."""
    raise_all(refusals(plan))


def refusals(plan: RunPlan) -> list[str]:
    """Return why training would refuse the recipe as launched, as far as neither its libraries nor data are needed."""
    model, experts = plan.recipe.model, plan.shape.text.experts
    problems = [problem for rule in _RULES for problem in rule(plan.recipe, plan.launch)]
    if model.load_in_fp8 is True and not plan.card.fp8:
        problems.append(f"load_in_fp8: {plan.card.name} has no products in FP8; use load_in_4bit, or a base in 16 bits")
    if model.fp8_gradients is True and not plan.card.fp8:
        problems.append(f"fp8_gradients: {plan.card.name} has no products in FP8; leave it out")
    if model.load_in_8bit and experts:
        problems.append(
            "load_in_8bit does not reach experts, most of the model's weights; use load_in_4bit or load_in_fp8"
        )
    if model.lora_scope == "experts" and not experts:
        problems.append("lora_scope: experts is for mixtures of experts, and this model has none; use language")
    return problems


def idle_keys(plan: RunPlan) -> list[str]:
    """Return the keys that have no effect in the recipe, which training refuses and a plan passes over."""
    return [problem for rule in IDLE_RULES for problem in rule(plan.recipe, plan.launch)]
