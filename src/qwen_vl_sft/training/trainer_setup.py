"""Put the trainer of a run together: its arguments, batches, callbacks and safeguards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig

from qwen_vl_sft.batching.collator import Collator
from qwen_vl_sft.batching.packed_collator import PackedCollator
from qwen_vl_sft.batching.packing import StepSampler
from qwen_vl_sft.batching.positions import Positions
from qwen_vl_sft.batching.sampler import EpochSampler, filled_items
from qwen_vl_sft.checkpointing.checkpoints import Checkpoint
from qwen_vl_sft.checkpointing.resumed_state import CorrectState
from qwen_vl_sft.compat.for_torch import turn_off_tf32_in_convolutions
from qwen_vl_sft.compat.for_transformers import use_one_gpu
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.config.settings import FIXED_TRAINING_ARGUMENTS
from qwen_vl_sft.data.dataset import Rows
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.modeling.flops import FlopCounter
from qwen_vl_sft.modeling.lora import lora_config
from qwen_vl_sft.modeling.unloaded_weights import add_unloaded_weights
from qwen_vl_sft.resilience.deadline import Deadline, parse_duration
from qwen_vl_sft.resilience.signals import SignalWatcher
from qwen_vl_sft.resilience.step_log import StepLog
from qwen_vl_sft.resilience.stopping import RunStopper
from qwen_vl_sft.training.callbacks import CheckWorld, EpochOrder, Progress
from qwen_vl_sft.training.generation_metrics import GenerationMetrics
from qwen_vl_sft.training.memory import MemoryProbe, largest_batch
from qwen_vl_sft.training.model_setup import finish_model, prepare_model
from qwen_vl_sft.training.plan_warnings import idle_on_cpu
from qwen_vl_sft.training.planned_memory import expected_bytes
from qwen_vl_sft.training.prepared_data import PreparedData
from qwen_vl_sft.training.resolve import Run
from qwen_vl_sft.training.safeguards import Safeguards, make_safeguards
from qwen_vl_sft.training.throughput import ThroughputMeter
from qwen_vl_sft.training.trainer import VisionSFTTrainer


def sft_config(run: Run) -> SFTConfig:
    """Build TRL's configuration of a run. It must exist before the model is loaded: ZeRO-3 partitions while loading."""
    recipe, context = run.recipe, run.context
    arguments = {**recipe.training, **FIXED_TRAINING_ARGUMENTS, **launch.training_arguments(context)}
    arguments["resume_from_checkpoint"] = None
    if context.on_cpu:
        # The plan tells that these have no effect there; the libraries would end with an error.
        for name in idle_on_cpu(recipe):
            del arguments[name]
    if recipe.run.packing:
        # The Trainer's batch is then a whole optimizer step; its micro-batches are planned by their tokens.
        arguments |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    arguments.setdefault("run_name", recipe.output_dir.name)
    # transformers' new names of these keys; TRL and its users still write the former ones.
    arguments["activation_checkpointing"] = recipe.run.gradient_checkpointing is not False
    kwargs = arguments.pop("gradient_checkpointing_kwargs", recipe.get("gradient_checkpointing_kwargs"))
    arguments["activation_checkpointing_kwargs"] = kwargs
    if recipe.model.use_peft and run.structure.adapts_language_only:
        # Every language adapter takes part in every batch, so DDP need not look for those that do not.
        arguments.setdefault("ddp_find_unused_parameters", False)
    try:
        config = SFTConfig(**arguments)
        use_one_gpu(config)
    except ValueError as error:
        raise UserError(f"recipe: {error}") from None
    if config.tf32 is False:
        turn_off_tf32_in_convolutions()
    return config


def build_trainer(
    run: Run,
    args: SFTConfig,
    data: PreparedData,
    resume: Checkpoint | None = None,
    watcher: SignalWatcher | None = None,
    signature: Mapping[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> VisionSFTTrainer:
    """Load the model and put its trainer together. All processes must call at once.

    Args:
        run: the resolved run.
        args: its `sft_config`.
        data: its data.
        resume: the checkpoint that it goes on from.
        watcher: knows when it is told to stop; None for a run that nothing stops, such as one that is measured.
        signature: stands in the manifests of its checkpoints (`run_signature`).
        callbacks: further ones.
    """
    recipe, context = run.recipe, run.context
    model = prepare_model(run, data.encoder.pad_token_id)
    positions = Positions(model.config)
    train_dataset, sampler = _train_items(run, data)
    train_collator = _collator(recipe, data, data.train, positions)
    collator: Any = train_collator
    if recipe.run.packing:
        # The vision tower casts pixels to its own type first thing; half the bytes then go to the GPU.
        cache = data.features.cache if data.features else None
        collator = PackedCollator(train_collator, positions, model.dtype, cache, recipe.run.share_prefixes)
    evaluation = data.evaluation
    counter = FlopCounter.of(model.config, recipe.model.use_peft, run.structure.trained_parts, recipe.run.packing)
    safeguards = make_safeguards(
        args, signature, resume, skips_nonfinite=recipe.run.nonfinite == "skip", can_skip=not context.zero_stage
    )
    stopper = _stopper(run, args, safeguards, watcher) if watcher else None
    trainer = VisionSFTTrainer(
        model=model,
        args=args,
        data_collator=collator,
        eval_collator=_collator(recipe, data, evaluation, positions) if evaluation else train_collator,
        train_dataset=train_dataset,
        eval_dataset=filled_items(len(evaluation.rows), args.eval_batch_size * context.processes)
        if evaluation
        else None,
        processing_class=data.encoder.processor,
        peft_config=lora_config(model, recipe.model) if recipe.model.use_peft else None,
        sampler=sampler,
        throughput=ThroughputMeter(args.device, counter),
        generation_metrics=_generation_metrics(recipe, data, args.eval_batch_size),
        safeguards=safeguards,
        stopper=stopper,
        router_aux_loss_coef=recipe.model.router_aux_loss_coef,
        **({} if recipe.model.use_peft else {"complete_saved": partial(add_unloaded_weights, recipe.model)}),
        callbacks=[*([EpochOrder(sampler)] if sampler else []), *callbacks],
    )
    for plain in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(plain)
    if not args.disable_tqdm:
        trainer.add_callback(Progress())
    finish_model(trainer.model, trainer.accelerator, run)
    trainer.add_callback(CheckWorld(context, trainer))
    if probe := _memory_probe(run, args, data, trainer, collator, sampler):
        trainer.add_callback(probe)
    if resume:
        trainer.add_callback(CorrectState(resume))
    if stopper:
        trainer.add_callback(StepLog(run.output_dir, context.rank, safeguards.guard, recipe.run.log_row_ids))
        trainer.add_callback(stopper)
    return trainer


def _memory_probe(
    run: Run, args: SFTConfig, data: PreparedData, trainer: VisionSFTTrainer, collator: Any, sampler: Any
) -> MemoryProbe | None:
    """Make what computes the largest micro-batch before the first step; None where it cannot be told, or not be tried."""
    recipe, context = run.recipe, run.context
    stated = recipe.get("gradient_checkpointing_kwargs") or {}
    # A reentrant checkpoint, as TRL makes it under ZeRO-3, takes no trial.
    reentrant = stated.get("use_reentrant") or context.strategy == "zero3"
    # The memory of a CPU cannot be measured so.
    if not isinstance(data.train, Scan) or context.on_cpu or reentrant:
        return None
    largest = partial(largest_batch, collator, data.train, sampler, args.train_batch_size)
    automatic = recipe.run.gradient_checkpointing == "auto"
    return MemoryProbe(trainer, largest, automatic, data.step_plan, expected=expected_bytes(run, data))


def _stopper(run: Run, args: SFTConfig, safeguards: Safeguards, watcher: SignalWatcher) -> RunStopper:
    limit = run.recipe.run.max_run_time
    return RunStopper(
        run.output_dir,
        run.context,
        args.device,
        watcher,
        Deadline(parse_duration(limit) if limit else None),
        safeguards.writer,
        safeguards.guard,
        safeguards.evaluations,
        safeguards.watchdog,
        streams=run.recipe.data.dataset_streaming,
    )


def _train_items(run: Run, data: PreparedData) -> tuple[Any, EpochSampler | StepSampler | None]:
    if data.step_plan is not None:
        return filled_items(len(data.step_plan.sizes.tokens), 1), StepSampler(data.step_plan, run.context.rank)
    if not isinstance(data.train, Scan):
        # Ranks of a stream may hold different numbers of rows; an endless one keeps them in step until max_steps.
        return data.train.dataset.repeat(None), None
    assert run.global_batch.rows is not None, "recipe rules refuse padded steps by tokens"
    items = filled_items(len(data.train.rows), run.global_batch.rows)
    return items, EpochSampler(len(data.train.rows), len(items), run.recipe.data_seed)


def _collator(recipe: Recipe, data: PreparedData, part: Scan | Rows, positions: Positions) -> Collator:
    skip = recipe.data.bad_rows == "skip"
    if isinstance(part, Scan):
        return Collator(part.rows, data.encoder, skip, part.filler, positions=positions, in_bytes=True)
    skip_overlong = recipe.data.overlong == "drop"
    return Collator(part, data.encoder, skip, skip_overlong=skip_overlong, positions=positions, in_bytes=True)


def _generation_metrics(recipe: Recipe, data: PreparedData, batch_size: int) -> GenerationMetrics | None:
    run = recipe.run
    if not run.predict_with_generate or data.evaluation is None:
        return None
    # Rounded ones would give other answers than an evaluation afterwards.
    kept = data.features.cache if data.features else None
    metrics = GenerationMetrics(
        data.evaluation,
        data.encoder,
        run.max_predict_samples,
        batch_size,
        run.max_new_tokens,
        recipe.output_dir,
        skip_bad_rows=recipe.data.bad_rows == "skip",
        kept_features=kept if kept and kept.storage in ("float32", recipe.model.dtype) else None,
    )
    metrics.check_measures((recipe.get("metric_for_best_model") or "loss").removeprefix("eval_"))
    return metrics
