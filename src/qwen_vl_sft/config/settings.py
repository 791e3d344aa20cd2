"""The keys of a recipe that are ours or TRL's `ModelConfig` and `ScriptArguments` names, with their defaults.

Every other key of a recipe is a field of TRL's `SFTConfig`, which extends transformers' `TrainingArguments`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal


def key(default: Any, text: str) -> Any:
    """Return the field of a recipe key with its default and its line in --help."""
    return field(default=default, metadata={"help": text})


# The formats of rows and what each reads. A test compares them with the modules of data/formats, which need no settings.
DATASET_FORMATS = {
    "chartqa": "image, query, label",
    "messages": "messages and images",
    "conversations": "like messages, but each turn has from and value",
    "prompt_completion": "prompt, completion and images",
}
if TYPE_CHECKING:
    DatasetFormat = str
else:
    DatasetFormat = Literal["auto", *DATASET_FORMATS]


@dataclass(frozen=True)
class DataSettings:
    """The data and how its rows are encoded."""

    dataset_name: str | None = key(
        None, "Hub id, local folder (parquet, JSONL, CSV, images, save_to_disk) or local file"
    )
    image_folder: str | None = key(
        None, "folder that image paths in rows are relative to; default: the folder of the dataset"
    )
    dataset_config: str | None = key(None, "configuration of the dataset, of those that its README.md names")
    dataset_revision: str | None = key(None, "branch, tag or commit of the Hub dataset; default: main")
    dataset_train_split: str = key("train", "split to train on; slices such as train[:10%] are allowed")
    dataset_test_split: str | None = key(None, "split to evaluate on while training")
    dataset_streaming: bool = key(False, "read rows one by one; needs max_steps, and cannot be resumed")
    dataset_format: DatasetFormat = key(
        "auto", f"{'; '.join(f'{name}: {text}' for name, text in DATASET_FORMATS.items())}; auto: chosen by the columns"
    )
    box_coordinates: Literal["pixels", "norm1", "norm1000"] | None = key(
        None,
        "coordinates of boxes and points in the data: pixels of the original image, 0 to 1, or 0 to 1000; they are learned"
        " in the model's; unset: pixels in column objects, and boxes in texts are learned as they are written",
    )
    ignored_columns: list[str] | None = key(
        None,
        "columns of the data that are left unread; others that no format reads are refused, but for id, source, ...",
    )
    system_message: str | None = key(
        None,
        "system message of rows that have none; default: the tutorial's for chartqa, else none; '' for none, where the"
        ' chat templates of Qwen2-VL and Qwen2.5-VL put "You are a helpful assistant."',
    )
    enable_thinking: bool = key(
        False,
        "Qwen3.5: rows have thoughts, and answers begin with one; false: neither; the same in training, evaluation and"
        " generation",
    )
    max_train_samples: int | None = key(None, "limit of training rows, applied after shuffle_dataset")
    max_eval_samples: int | None = key(None, "limit of evaluation rows, taken evenly over the split")
    shuffle_dataset: bool = key(
        False, "shuffle by data_seed (or seed) before max_train_samples; epochs are always shuffled"
    )
    bad_rows: Literal["error", "skip"] = key("error", "unusable rows: stop, or leave them out and count them")
    overlong: Literal["error", "drop"] = key(
        "error", "rows longer than max_length: stop, or leave them out and count them"
    )
    max_length: int | None = key(None, "limit of tokens of a row, images included; an image is never cut")
    verify_images: bool = key(True, "decode every image once before training; false reads only its header")
    dataset_num_proc: int | None = key(None, "processes that check the rows before training; unset: one for each core")
    train_on: Literal["assistant", "all"] = key(
        "assistant", "loss on answers and their end-of-turn, or on every token except images and padding"
    )
    min_pixels: int | None = key(None, "smaller images are enlarged to this many pixels; default: the processor's")
    max_pixels: int | None = key(None, "larger images are reduced to this many pixels; default: the processor's")


@dataclass(frozen=True)
class ModelSettings:
    """The base model and which of its weights are trained."""

    model_name_or_path: str | None = key(None, "Hub id or local folder")
    model_revision: str = key("main", "branch, tag or commit of the Hub model")
    dtype: Literal["bfloat16", "float16", "float32"] = key("bfloat16", "precision of weights that are not quantized")
    attn_implementation: str = key(
        "auto",
        "auto picks flash_attention_3, 4 (packing) or 2 when installed on CUDA, else sdpa with this package's kernel"
        " for images",
    )
    fused_kernels: Literal["auto"] | list[str] | None = key(
        None,
        "auto for all that can run here but experts, or a list of rms_norm, swiglu, rope (these need liger-kernel),"
        " linear_attention (needs fla-core), quick_gelu, experts, patch_embed, lora; all but the last two"
        " need CUDA; unset disables them",
    )
    trust_remote_code: bool = key(False, "run model code that comes from the Hub")
    use_safetensors: bool = key(True, "false also loads pickled weights and states, which can run code")
    load_in_4bit: bool = key(False, "QLoRA: base weights in 4 bits")
    load_in_8bit: bool = key(False, "base weights in 8 bits")
    load_in_fp8: bool | Literal["emulation"] = key(
        False,
        "base weights in FP8 (e4m3, a scale a row), and products in FP8: Ada, Hopper or newer; emulation: the same rounding"
        " with products in float32 on any device, slow, for tests",
    )
    fp8_modules: list[str] | None = key(
        None,
        "load_in_fp8, fp8_gradients: modules whose linear layers are FP8 beside the language model's, such as visual.blocks",
    )
    fp8_forward: bool = key(True, "load_in_fp8: products of the forward pass in FP8; false computes them in dtype")
    fp8_backward: bool = key(True, "load_in_fp8: products that give gradients of inputs in FP8; false: in dtype")
    fp8_kernels: Literal["auto"] | list[str] | None = key(
        "auto",
        "load_in_fp8: auto for all Triton kernels, or a list of quantize, transpose, rms_norm, projections, mlp; unset"
        " disables them. fp8_gradients: of the first two",
    )
    fp8_gradients: bool | Literal["emulation"] = key(
        False,
        "base in 16 bits: products that give gradients of inputs in FP8, those of the forward pass in dtype: Ada, Hopper or"
        " newer; emulation as for load_in_fp8",
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = key("nf4", "4-bit data type")
    use_bnb_nested_quant: bool = key(True, "quantize the quantization constants too (double quantization)")
    use_peft: bool = key(True, "train a LoRA adapter; false trains the model's own weights")
    lora_r: int = key(16, "rank")
    lora_alpha: int = key(32, "scale: the adapter is multiplied by alpha / r")
    lora_dropout: float = key(0.0, "dropout on the adapter's input")
    lora_scope: Literal["language", "vision", "merger", "all", "experts"] = key(
        "language",
        "part of the model that gets LoRA, in all its linear layers unless lora_target_modules is set; experts: language, and"
        " every expert of a mixture",
    )
    lora_target_modules: list[str] | None = key(
        None, "names of layers, e.g. [q_proj, v_proj]; default, and all-linear: every linear layer of lora_scope"
    )
    lora_modules_to_save: list[str] | None = key(None, "layers trained in full in addition to the adapter")
    use_rslora: bool = key(False, "scale by alpha / sqrt(r)")
    use_dora: bool = key(False, "weight-decomposed LoRA")
    init_adapter: str | None = key(
        None,
        "run folder, checkpoint or PEFT adapter, here or on the Hub (NAME or NAME@REVISION), whose LoRA weights a new run"
        " starts from (a second stage); it settles rank, scale and layers, and the base model",
    )
    freeze_vision_tower: bool = key(False, "full fine-tuning (use_peft: false) does not train the vision tower")
    train_router: bool = key(
        False, "mixtures of experts: train the routers in full; false freezes them, in full fine-tuning too"
    )
    router_aux_loss_coef: float = key(
        0.0,
        "mixtures of experts: weight of the loss that evens out how often experts are chosen, over the global batch; a"
        " step of several micro-batches then runs forward twice; 0 for none, whatever the model's configuration says",
    )

    @property
    def precision(self) -> str:
        """Return the precision of weights and computation, in words."""
        if self.load_in_8bit:
            return f"8-bit weights, computed in {self.dtype}"
        if self.load_in_fp8:
            emulated = ", emulated in float32" if self.load_in_fp8 == "emulation" else ""
            ways = {"forward": self.fp8_forward, "backward": self.fp8_backward}
            fp8 = [way for way, wanted in ways.items() if wanted]
            in_fp8 = (
                f"{' and '.join(fp8)} products in FP8{emulated}, else {self.dtype}"
                if fp8
                else f"computed in {self.dtype}"
            )
            return f"FP8 (e4m3) weights, {in_fp8}"
        if self.load_in_4bit:
            double = ", double quantization" if self.use_bnb_nested_quant else ""
            return f"4-bit {self.bnb_4bit_quant_type} weights{double}, computed in {self.dtype}"
        return self.dtype


@dataclass(frozen=True)
class RunSettings:
    """The run as a whole."""

    global_batch_size: int | None = key(
        None, "rows of an optimizer step over all processes; sets gradient_accumulation_steps"
    )
    global_batch_tokens: int | None = key(
        None, "packing: about this many tokens in an optimizer step, in whole rows; replaces global_batch_size"
    )
    packing: bool = key(False, "pack rows into sequences of tokens_per_batch tokens instead of padding them")
    tokens_per_batch: int = key(
        8192, "packing: limit of tokens of a micro-batch; the rows of an optimizer step do not depend on it"
    )
    share_prefixes: bool = key(
        False, "packing: train questions on the same images, and rows that begin alike, on one copy of that; exact"
    )
    gradient_checkpointing: bool | Literal["auto"] = key(
        True, "recompute activations instead of keeping them; auto: in as few layers as GPU memory allows"
    )
    cache_image_features: Literal["bfloat16", "int8", "float32"] | None = key(
        None, "packing: cache the frozen vision tower's output for each training image on disk, in this precision"
    )
    image_features_dir: str | None = key(
        None, "folder of cache_image_features; default: qwen_vl_sft/image_features in the user's cache folder"
    )
    nonfinite: Literal["error", "skip"] = key(
        "error", "a step with a NaN or infinite loss or gradient: stop and name its rows, or skip and count it"
    )
    max_run_time: str | None = key(
        None, "save and stop (exit code 75) within this time: 3h30m, HH:MM:SS, D-HH:MM:SS or seconds"
    )
    log_row_ids: bool = key(False, "write the row ids of every step to row_ids-RANK.jsonl")
    overwrite_output_dir: bool = key(False, "delete the files of an earlier run in output_dir")
    predict_with_generate: bool = key(
        False,
        "at every evaluation also answer rows and log relaxed_accuracy, exact_match and the other metrics; mean_iou and"
        " those of boxes where the rows have some",
    )
    max_predict_samples: int | None = key(128, "rows that predict_with_generate answers, taken evenly over the split")
    max_new_tokens: int = key(
        64, "limit of tokens of an answer, in predict_with_generate and when the run is evaluated or asked"
    )
    push_to_hub: bool = key(
        False, "publish the finished run with a model card; the token's rights are checked before anything starts"
    )
    hub_model_id: str | None = key(
        None, "repository, as user/name or as a name of your own; default: the name of output_dir"
    )
    hub_private_repo: bool = key(
        True, "a new repository is private, and an existing one must be; false allows public ones"
    )
    hub_revision: str | None = key(None, "branch to publish to, created if missing; default: main")
    hub_strategy: Literal["end", "every_save"] = key(
        "end", "end: publish the finished run; every_save: also each checkpoint's model, in the background"
    )
    hub_always_push: bool = key(False, "every_save: also queue a checkpoint while the one before is still being sent")


GROUPS: dict[str, type] = {"Data": DataSettings, "Model and LoRA": ModelSettings, "Run": RunSettings}

# Where our default differs from TRL's.
TRAINING_DEFAULTS: dict[str, Any] = {
    "report_to": ["tensorboard"],
    # The filter replaces a NaN in the logs with the average so far; a NaN should be seen.
    "logging_nan_inf_filter": False,
    # Left to itself it follows the verbosity of transformers, which is turned down.
    "disable_tqdm": False,
}

# Metrics that earlier versions called otherwise.
FORMER_METRICS = {"strict_relaxed_accuracy": "normalised_relaxed_accuracy"}


def current_metric(name: str) -> str:
    """Return the name of a metric, with or without `eval_`, also for the one that an earlier version gave it."""
    bare = name.removeprefix("eval_")
    return name[: len(name) - len(bare)] + FORMER_METRICS.get(bare, bare)


# Set by the package for every run, so not keys of a recipe.
FIXED_TRAINING_ARGUMENTS: dict[str, Any] = {
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "max_length": None,
    "average_tokens_across_devices": True,
    # Otherwise TRL adds what the configuration of a mixture of experts says, a mean over each micro-batch.
    "router_aux_loss_coef": 0.0,
}

_STRATEGY = "the launcher sets the strategy: accelerate launch --config_file accelerate_configs/..."
_LOSS = "train_on sets which tokens the loss covers"
_COMPILING = (
    "lengths and images differ from batch to batch, so it would recompile for minutes each time; see fused_kernels"
)
_ENCODING = "rows are encoded by this package; see dataset_format, system_message and max_length"
# Fields of SFTConfig that a recipe may not set, and why.
REFUSED_KEYS: dict[str, str] = {
    "deepspeed": _STRATEGY,
    "fsdp": _STRATEGY,
    "fsdp_config": _STRATEGY,
    "parallelism_config": _STRATEGY,
    "accelerator_config": _STRATEGY,
    "local_rank": _STRATEGY,
    "assistant_only_loss": _LOSS,
    "completion_only_loss": _LOSS,
    "label_smoothing_factor": _LOSS,
    "dataset_text_field": _ENCODING,
    "dataset_kwargs": _ENCODING,
    "chat_template_path": _ENCODING,
    "eos_token": _ENCODING,
    "pad_token": _ENCODING,
    "truncation_mode": "nothing is ever truncated; see overlong",
    "pad_to_multiple_of": _ENCODING,
    "packing_strategy": "packing: true packs each optimizer step on its own, as evenly as possible",
    "padding_free": "packing: true pads nothing",
    "eval_packing": "the evaluation loss is the same packed or padded; it is computed on padded batches",
    "model_init_kwargs": "the model has keys of its own: dtype, attn_implementation, load_in_4bit, ...",
    "remove_unused_columns": "columns are read by dataset_format",
    "label_names": "the labels are this package's",
    "average_tokens_across_devices": "the loss is always the token mean of the global batch",
    "auto_find_batch_size": "it would silently change the global batch; set per_device_train_batch_size",
    "train_sampling_strategy": "every epoch visits each row once, in an order that depends on the seed",
    "length_column_name": "every epoch visits each row once, in an order that depends on the seed",
    "dataloader_in_order": "every epoch visits each row once, in an order that depends on the seed",
    "dataloader_drop_last": "every epoch visits each row once",
    "do_train": "scripts/sft.py always trains",
    "do_eval": "use eval_strategy",
    "do_predict": "use scripts/evaluate.py",
    "prediction_loss_only": "for accuracy while training set predict_with_generate",
    "include_for_metrics": "for accuracy while training set predict_with_generate",
    "batch_eval_metrics": "for accuracy while training set predict_with_generate",
    "eval_accumulation_steps": "for accuracy while training set predict_with_generate",
    "eval_do_concat_batches": "for accuracy while training set predict_with_generate",
    "eval_use_gather_object": "for accuracy while training set predict_with_generate",
    "activation_checkpointing": "write gradient_checkpointing, the name TRL uses",
    "activation_checkpointing_kwargs": "write gradient_checkpointing_kwargs, the name TRL uses",
    "use_liger_kernel": "its patch of Qwen2-VL does not import with transformers 5.23; see fused_kernels",
    "liger_kernel_config": "its patch of Qwen2-VL does not import with transformers 5.23; see fused_kernels",
    "torch_compile": _COMPILING,
    "torch_compile_backend": _COMPILING,
    "torch_compile_mode": _COMPILING,
    "enable_jit_checkpoint": "it can save in the middle of a step, where a resume is not exact",
    "use_cache": "it is always off while training",
    "hub_token": "a token does not belong in a recipe; use `hf auth login` or HF_TOKEN",
}
