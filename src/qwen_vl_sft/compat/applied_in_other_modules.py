"""List the changes to libraries that other modules apply: attention, kernels, checkpoints, caches."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import nn

from qwen_vl_sft.compat.registry import Patch, embedded_model, source_of


def _sdpa_loops_over_images() -> bool:
    """Return whether the vision tower's attention splits images in Python unless its name holds "flash"."""
    from transformers.utils.generic import is_flash_attention_requested

    source = inspect.getsource(type(embedded_model().model.visual.blocks[0].attn).forward)
    by_name = is_flash_attention_requested(requested_attention_implementation="segmented_flash")
    return by_name and "is_flash_attention_requested" in source and "torch.split(" in source


def _ligers_own_patch_fails() -> bool:
    """Return whether liger-kernel's patch of the embedded model's family does not import."""
    try:
        importlib.import_module(f"liger_kernel.transformers.model.{embedded_model().config.model_type}")
    except ImportError:
        return True
    return False


def _decays_norms_and_states() -> bool:
    """Return whether the Trainer counts norms by other names, and what linear attention forgets by, as matrices."""
    from transformers import Trainer

    model = nn.Module()
    for name in ("norm1", "ln_q"):
        # Qwen2.5-VL's are no layers of `torch.nn`.
        setattr(model, name, nn.ParameterDict({"weight": torch.ones(2)}))
    model.A_log = nn.Parameter(torch.zeros(2))
    trainer: Any = None
    return bool(Trainer.get_decay_parameter_names(trainer, model))


PATCHES = (
    Patch(
        name="use_segmented_vision_attention",
        package="transformers",
        broken="<=5.23",
        without="With sdpa every layer of the vision tower loops over the images of a batch in Python.",
        applied_by="modeling.attention.use_segmented_vision_attention",
        links=("https://github.com/huggingface/transformers/pull/47703",),
        still_needed=_sdpa_loops_over_images,
        relies_on={
            "transformers.AttentionInterface.register": ("key", "value"),
            "transformers.AttentionMaskInterface.register": ("key", "value"),
        },
    ),
    Patch(
        name="use_packed_attention",
        package="transformers",
        broken="<=5.23",
        kind="extension",
        without="Packed rows that share a beginning cannot attend inside their own bounds.",
        applied_by="modeling.attention.use_packed_attention",
        relies_on={
            "transformers.integrations.sdpa_attention.sdpa_attention_forward": ("module", "attention_mask", "scaling"),
            "transformers.masking_utils.sdpa_mask": ("attention_mask",),
        },
    ),
    Patch(
        name="begin_states_anew",
        package="transformers",
        broken="<=5.23",
        kind="extension",
        without="Linear attention carries one packed row's convolution and state into the next, and cannot share a prefix's.",
        applied_by="families.gated_delta_net.take_pieces",
        reads={
            "model.model.language_model.layers.0.linear_attn.forward": (
                "self.in_proj_qkv(hidden_states)",
                "self.key_dim,\n                self.key_dim,\n                self.value_dim,",
                "beta = b.sigmoid()",
                "g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)",
                "torch_chunk_gated_delta_rule(\n",
                "initial_state=recurrent_state,",
                "use_qk_l2norm_in_kernel=True,",
                "core_attn_out = self.norm(core_attn_out, z)",
                "output = self.out_proj(core_attn_out)",
            ),
        },
    ),
    Patch(
        name="decay_no_vectors",
        package="transformers",
        broken="<=5.23",
        without="`weight_decay` shrinks the norms of Qwen2.5-VL's tower, and how fast Qwen3.5's linear attention forgets.",
        applied_by="training.trainer.VisionSFTTrainer",
        still_needed=_decays_norms_and_states,
        relies_on={"transformers.Trainer.get_decay_parameter_names": ("model",)},
    ),
    Patch(
        name="use_fused_kernels",
        package="liger-kernel",
        broken="<=0.8.5",
        without="liger-kernel's own patch of Qwen2-VL does not import with transformers 5.23.",
        applied_by="modeling.kernels.use_fused_kernels",
        links=("https://github.com/linkedin/Liger-Kernel",),
        needs="liger-kernel",
        still_needed=_ligers_own_patch_fails,
    ),
    Patch(
        name="fuse_patch_embed",
        package="transformers",
        broken="<=5.23",
        without="cuDNN has no fast bfloat16 convolution for the vision tower's first layer.",
        applied_by="modeling.kernels.use_fused_kernels",
        links=(
            "https://github.com/huggingface/transformers/issues/45750",
            "https://github.com/huggingface/transformers/pull/45041",
        ),
        still_needed=lambda: isinstance(embedded_model().model.visual.patch_embed.proj, nn.Conv3d),
    ),
    Patch(
        name="fuse_rotary_embedding",
        package="transformers",
        broken="<=5.23",
        kind="extension",
        without="Rotary embeddings are computed in chains of small operations.",
        applied_by="modeling.kernels.use_fused_kernels",
        reads={
            "model.model.language_model.layers.-1.self_attn.forward": ("rotary_pos_emb(", "cos, sin"),
            "model.model.visual.blocks.0.attn.forward": ("rotary_pos_emb_vision(query_states, key_states, cos, sin)",),
        },
    ),
    Patch(
        name="positions_without_a_model",
        package="transformers",
        broken="<=5.23",
        kind="extension",
        without="The model works out positions in every forward, and waits for the GPU; workers hold no model.",
        applied_by="families.base.rope_index_of_class",
        relies_on={
            "model.model.get_rope_index": ("input_ids", "image_grid_thw"),
            "model.model.get_vision_position_ids": (),
        },
    ),
    Patch(
        name="go_on_with_this_runs_schedule",
        package="torch",
        broken="<=2.11",
        kind="extension",
        without="A resume continues with the peak learning rate of the checkpoint.",
        applied_by="checkpointing.resumed_state.take_schedule",
        reads={"torch.optim.lr_scheduler.LRScheduler": ("_last_lr", "base_lrs")},
    ),
    Patch(
        name="fuse_lora",
        package="peft",
        broken="<=0.21.2",
        without="An adapter's layer makes three passes over its widest activations, and rounds three times.",
        applied_by="modeling.kernels.use_fused_lora",
        still_needed=lambda: (
            "result = result + lora_B(lora_A(dropout(x))) * scaling"
            in source_of("peft.tuners.lora.layer.Linear.forward")
        ),
        reads={"peft.tuners.lora.layer.LoraLayer": ("self.lora_variant", "self.lora_bias", "self.scaling")},
    ),
    Patch(
        name="silence_renamed_arguments",
        package="peft",
        broken="<=0.21.2",
        without="Every start warns of names that PEFT uses and transformers has renamed.",
        applied_by="console.quiet_libraries",
        still_needed=lambda: "is_gradient_checkpointing" in source_of("peft.peft_model"),
    ),
    Patch(
        name="keep_compiled_kernels",
        package="flash-attn-4",
        broken="<=4.0.0b36",
        kind="extension",
        without="FlashAttention-4 recompiles its kernels in every run, or caches them where others may write.",
        applied_by="modeling.attention_kernels.varlen_kernel",
        needs="flash-attn-4",
    ),
)
