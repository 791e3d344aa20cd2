"""Set up a model before it trains: as it comes from the disk, and once the trainer has given it its adapter."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.compat.for_accelerate import round_as_one_process_does
from qwen_vl_sft.compat.for_torch import gather_bytes
from qwen_vl_sft.compat.for_trl import call_head_after_backbone, score_places_as_they_come
from qwen_vl_sft.compat.packed_batches import count_no_placeholders_in_training, take_packed_batches
from qwen_vl_sft.compat.vision_tower import (
    run_frozen_blocks_without_gradients,
    run_frozen_vision_without_gradients,
    run_vision_in_every_batch,
)
from qwen_vl_sft.distributed import launch
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.modeling import linear_attention
from qwen_vl_sft.modeling.attention import use_packed_attention, use_segmented_vision_attention
from qwen_vl_sft.modeling.attention_kernels import SDPA, varlen_kernel
from qwen_vl_sft.modeling.base_model import (
    freeze_for_full_training,
    is_vision_frozen,
    load_config,
    load_model,
    trained_parts,
)
from qwen_vl_sft.modeling.experts import check_adapted, use_grouped_lora
from qwen_vl_sft.modeling.fp8.computation import join_chosen_projections
from qwen_vl_sft.modeling.fp8.gradients import use_fp8_gradients
from qwen_vl_sft.modeling.kernels import LORA, use_fused_kernels, use_fused_lora
from qwen_vl_sft.modeling.lora import EXPERTS
from qwen_vl_sft.training.resolve import Run
from qwen_vl_sft.training.second_stage import load_init_adapter


def prepare_model(run: Run, pad_token_id: int) -> Any:
    """Load the base model of a run as its trainer takes it."""
    recipe, context, chosen = run.recipe, run.context, run.chosen
    if recipe.run.packing and chosen.attention != SDPA:
        varlen_kernel(chosen.attention)  # what cannot be imported is told before the weights are loaded
    computed_in = getattr(torch, recipe.mixed_precision) if recipe.mixed_precision else None
    if not context.on_cpu and linear_attention.NAME not in run.structure.family.unfit_kernels:
        linear_attention.complete_installed()
    kernels = ready_kernels(run, computed_in or getattr(torch, recipe.model.dtype))
    model = load_model(recipe.model, context.on_cpu, context.local_rank, context.strategy, computed_in)
    if not recipe.model.use_peft:
        freeze_for_full_training(model, recipe.model)
    # The Qwen-VL configurations name no padding token; the Trainer would set it, and warn.
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        config.pad_token_id = pad_token_id
    if recipe.run.packing:
        if chosen.attention != SDPA:  # otherwise it was loaded so
            use_segmented_vision_attention(model, chosen.attention)
        use_packed_attention(model, chosen.attention)
        count_no_placeholders_in_training(model)
        # The auxiliary loss is over all tokens of all layers.
        take_packed_batches(model, spares_last_layer=not recipe.model.router_aux_loss_coef)
    use_fused_kernels(model, kernels)
    if recipe.model.fp8_gradients:
        use_fp8_gradients(model, recipe.model, context.on_cpu)
    return model


def ready_kernels(run: Run, dtype: torch.dtype) -> list[str]:
    """Return the fused kernels of a run. Those of linear attention are tuned and compared before the weights take the memory.

    One process of a machine compiles them for all. Those that do not run, or compute something else, are left out where
    the recipe says "auto"; where it names them, that is a `UserError`.
    """
    recipe, context, names = run.recipe, run.context, run.chosen.fused_kernels
    if dtype == torch.float32 or not recipe.run.packing or linear_attention.NAME not in names:
        return names
    with launch.join(context, recipe.get("ddp_backend")).local_main_process_first():
        device = torch.device("cuda", context.local_rank)
        try:
            seconds = linear_attention.tune(load_config(recipe.model), dtype, device, recipe.run.share_prefixes)
        except UserError as error:
            if recipe.model.fused_kernels != "auto":
                raise
            print(f"warning: {error}; this run does so, and is slower", file=sys.stderr, flush=True)
            return [name for name in names if name != linear_attention.NAME]
    if context.rank == 0:
        print(f"linear      kernels of linear attention compared with float32, ready in {seconds:.0f} s", flush=True)
    return names


def needs_vision_in_every_batch(context: DistributedContext, vision_frozen: bool) -> bool:
    """Return whether a batch without images must run the vision tower too."""
    if context.strategy == "zero3" and not vision_frozen:
        # A weight without a gradient would be moved by its last one again, on one process too.
        return True
    return context.processes > 1 and (context.strategy in ("zero3", "fsdp2") or not vision_frozen)


def finish_model(model: Any, accelerator: Any, run: Run) -> None:
    """Do what can be done once the model has its adapter, before a strategy wraps it."""
    recipe, context = run.recipe, run.context
    if recipe.model.use_peft:
        keep_trained_weights_in_float32(model)
        load_init_adapter(model, recipe.model)
        if recipe.model.lora_scope == EXPERTS:
            count = check_adapted(model)
            use_grouped_lora(model)
            if context.rank == 0:
                print(f"experts     each of the {count:,} has an adapter that trains", flush=True)
        if LORA in run.chosen.fused_kernels:
            use_fused_lora(model)
        join_chosen_projections(model, recipe.model, context.on_cpu)
    elif recipe.get("bf16") and context.strategy in ("single", "ddp"):
        # ZeRO and FSDP2 see to it themselves. Without bf16 there is nothing to compute in but the weights as they are.
        keep_trained_weights_in_float32(model)
    round_as_one_process_does(accelerator)
    if context.strategy == "fsdp2" and (recipe.model.load_in_4bit or recipe.model.load_in_fp8):
        gather_bytes()
    trained, vision_frozen = trained_parts(model), is_vision_frozen(model)
    if vision_frozen:
        run_frozen_vision_without_gradients(model)
    elif "vision" not in trained:
        run_frozen_blocks_without_gradients(model)
    base = model.get_base_model() if recipe.model.use_peft else model
    if recipe.run.packing:
        score_places_as_they_come(base)
    if needs_vision_in_every_batch(context, vision_frozen):
        run_vision_in_every_batch(base)
    if context.strategy == "fsdp2":
        call_head_after_backbone(base)


def keep_trained_weights_in_float32(model: nn.Module) -> None:
    """Hold what trains in float32, in which small steps of the optimizer are not lost.

    TRL casts QLoRA adapters to bfloat16, and a whole model is in the recipe's `dtype`. A resume would also load adapters
    in float32, and so go on otherwise than the run it resumes. With `bf16: true` each strategy computes in bfloat16 all
    the same, and ZeRO keeps float32 copies of its own; with `bf16: false` ZeRO and FSDP2 would take gradients in bfloat16
    too, and end 1% off the weights of DDP.
    """
    for parameter in model.parameters():
        halved = parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16)
        # ZeRO-3 knows the type of what it has split already, such as a copy of a layer that trains in full.
        if halved and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.float()
