"""How the keys of a recipe go together: one small rule a concern, all of their problems reported at once."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from transformers.training_args import trainer_log_levels

from qwen_vl_sft.batching.batch_rules import BATCH_RULES, Rule
from qwen_vl_sft.checkpointing.checkpoints import LATEST, marked
from qwen_vl_sft.checkpointing.run_folder import problems_of_output_dir
from qwen_vl_sft.config.range_rules import RANGE_RULES
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.distributed.launch import DistributedContext
from qwen_vl_sft.errors import UserError, raise_all
from qwen_vl_sft.evaluation.metrics import METRICS
from qwen_vl_sft.modeling.chosen import choose
from qwen_vl_sft.modeling.kernels import chosen_kernels, problems_of_kernels
from qwen_vl_sft.modeling.lora_rules import LORA_RULES
from qwen_vl_sft.publishing.names import problem_of_branch, problem_of_repo_id
from qwen_vl_sft.publishing.publication import problem_of_base
from qwen_vl_sft.resilience.run_rules import RUN_RULES
from qwen_vl_sft.training.nested_rules import NESTED_RULES

# What every evaluation measures while training; those of `METRICS` come with predict_with_generate.
EVALUATION_METRICS = ("loss", "mean_token_accuracy")
LORA_KEYS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_scope",
    "lora_target_modules",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)


def check(recipe: Recipe, context: DistributedContext) -> None:
    """Raise one `UserError` with everything that cannot work in this recipe, on this world."""
    raise_all([problem for rule in RULES for problem in rule(recipe, context)])


def _required(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    stated = {
        "model_name_or_path": recipe.model.model_name_or_path,
        "dataset_name": recipe.data.dataset_name,
        "output_dir": recipe.training.get("output_dir"),
    }
    for name, value in stated.items():
        if not value:
            yield f"{name} is missing: set it in the recipe, or on the command line as --{name}"
    model = recipe.model.model_name_or_path or ""
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        yield f"model_name_or_path: {model} is not a folder here"
    data = recipe.data.dataset_name or ""
    if data.startswith((".", "/", "~")) and not Path(data).expanduser().exists():
        yield f"dataset_name: {data} does not exist here"


def _training_kind(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    model = recipe.model
    if model.load_in_4bit and model.load_in_8bit:
        yield "load_in_4bit and load_in_8bit are both true; keep one"
    quantized = "load_in_4bit" if model.load_in_4bit else "load_in_8bit" if model.load_in_8bit else None
    if quantized and not model.use_peft:
        yield f"{quantized} with use_peft: false: quantized weights cannot be trained; set use_peft: true (QLoRA)"
    if not model.use_peft:
        for name in LORA_KEYS:
            if name in recipe.stated:
                yield f"{name} is set but use_peft is false, so there is no adapter; remove one of the two"
    elif model.freeze_vision_tower:
        yield "freeze_vision_tower is for full fine-tuning: with use_peft the base is frozen, and lora_scope says the rest"
    if recipe.get("fp16") and recipe.get("bf16"):
        yield "fp16 and bf16 are both true; keep one"
    if model.dtype == "float16" and not model.use_peft:
        yield "dtype: float16 with use_peft: false: float16 weights cannot be trained; use bfloat16 or float32"
    yield from problems_of_kernels(chosen_kernels(model.fused_kernels, context.on_cpu), context.on_cpu)
    try:
        choose(recipe, context)
    except UserError as error:
        yield str(error)


def _strategy(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.model.load_in_8bit and context.strategy in ("zero3", "fsdp2"):
        yield f"load_in_8bit does not run under {context.strategy}: 8-bit weights cannot be sharded; use load_in_4bit, or ddp"


def _evaluation(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    evaluates = recipe.get("eval_strategy") != "no"
    if evaluates and not recipe.data.dataset_test_split:
        yield "eval_strategy is set but dataset_test_split is not: name the split to evaluate on, or set eval_strategy: no"
    if recipe.get("save_strategy") == "best" and not evaluates:
        yield "save_strategy: best saves after evaluations alone: set eval_strategy and dataset_test_split"
    yield from _best_metric(recipe)
    if not recipe.get("load_best_model_at_end"):
        return
    if not evaluates:
        yield "load_best_model_at_end needs evaluation: set eval_strategy and dataset_test_split"
    elif recipe.get("save_strategy") not in (recipe.get("eval_strategy"), "best"):
        yield (
            f"load_best_model_at_end needs save_strategy {recipe.get('save_strategy')} to equal eval_strategy"
            f" {recipe.get('eval_strategy')}, so that every evaluated model can be saved"
        )
    elif recipe.get("eval_strategy") == "steps" and recipe.get("save_strategy") == "steps":
        yield from _intervals_of_best(recipe.get("save_steps"), recipe.get("eval_steps") or recipe.get("logging_steps"))


def _intervals_of_best(save: float, every: float) -> Iterator[str]:
    """As transformers would refuse them. Below 1 they are shares of all steps."""
    if every <= 0:
        return
    if (save < 1) != (every < 1):
        yield (
            f"load_best_model_at_end needs save_steps {save} to be a multiple of eval_steps {every}, and one of them is a"
            f" share of all steps; write both as shares, or both as steps"
        )
    # Decimals, so that 0.5 is five times 0.1.
    elif Fraction(str(save)) % Fraction(str(every)):
        yield f"load_best_model_at_end needs save_steps {save} to be a multiple of eval_steps {every}"


def _best_metric(recipe: Recipe) -> Iterator[str]:
    stated = recipe.get("metric_for_best_model")
    if recipe.get("save_strategy") == "best" and stated is None and not recipe.get("load_best_model_at_end"):
        yield "save_strategy: best needs metric_for_best_model, such as eval_loss: the best by what?"
    if stated is None and recipe.get("load_best_model_at_end"):
        stated = "eval_loss"  # what transformers takes
    if stated is None:
        return
    metric, greater = stated.removeprefix("eval_"), recipe.get("greater_is_better")
    known = (*EVALUATION_METRICS, *METRICS)
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
        yield f"metric_for_best_model: {stated!r} is not measured; {hint}"
    elif metric in METRICS and not recipe.run.predict_with_generate:
        yield f"metric_for_best_model: {stated} is measured with predict_with_generate: true only; set it, or use eval_loss"
    elif greater is not None and greater == (metric == "loss"):
        yield f"greater_is_better: {str(greater).lower()} would keep the worst model by {stated}; leave the key out"


def _streaming(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if not recipe.data.dataset_streaming:
        return
    if recipe.get("max_steps") <= 0:
        yield "dataset_streaming needs max_steps: the length of a stream is not known"
    if recipe.get("eval_strategy") != "no" and recipe.data.max_eval_samples is None:
        yield "dataset_streaming with evaluation needs max_eval_samples: evaluation rows are kept in memory"
    resume = recipe.get("resume_from_checkpoint")
    saved = [folder.name for folder in marked(recipe.output_dir)] if recipe.training.get("output_dir") else []
    # A queued job is always told `latest`; where there is none yet, it starts anew.
    if resume and (resume != LATEST or saved):
        yield (
            f"dataset_streaming cannot go on from {saved[-1] if resume == LATEST else resume}: where in the stream that was"
            f" is not known; start anew in another output_dir, or set dataset_streaming: false there, which can be resumed"
        )


def _reporting(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
    report_to = recipe.get("report_to")
    names = report_to if isinstance(report_to, list) else [report_to]
    for name in names:
        if name in packages and importlib.util.find_spec(packages[name]) is None:
            yield f"report_to: {name} is not installed; pip install {packages[name]}, or remove it"
        elif name == "none" and len(names) > 1:
            yield "report_to: none stands beside others; keep it alone, or remove it"
        elif name not in packages and name != "none":
            yield f"report_to: {name!r} is unknown; tensorboard, wandb, trackio or none"
    for key in ("log_level", "log_level_replica"):
        if recipe.get(key) not in trainer_log_levels:
            yield f"{key}: {recipe.get(key)!r} is unknown; one of {', '.join(trainer_log_levels)}"


def _loss(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.get("loss_type") not in ("nll", "dft"):
        yield f"loss_type: {recipe.get('loss_type')!r} is unknown; nll or dft"


def _publishing(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    run = recipe.run
    if not run.push_to_hub:
        return
    if run.hub_model_id and (problem := problem_of_repo_id(run.hub_model_id)):
        yield f"hub_model_id: {problem}"
    if run.hub_revision and (problem := problem_of_branch(run.hub_revision)):
        yield f"hub_revision: {problem}"
    if problem := problem_of_base(recipe.model.model_name_or_path, recipe.model.use_peft):
        yield problem
    if run.hub_strategy == "every_save" and recipe.get("save_strategy") == "no":
        yield "hub_strategy: every_save publishes checkpoints, and save_strategy is no; set it, or hub_strategy: end"
    if run.hub_strategy == "every_save" and context.strategy == "fsdp2":
        yield "hub_strategy: every_save cannot run under fsdp2: its checkpoints hold no whole weights; set hub_strategy: end"


def _output(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.training.get("output_dir"):
        yield from problems_of_output_dir(
            recipe.output_dir, recipe.run.overwrite_output_dir, recipe.get("resume_from_checkpoint")
        )


RULES: tuple[Rule, ...] = (
    _required,
    *RANGE_RULES,
    *NESTED_RULES,
    _training_kind,
    *LORA_RULES,
    _strategy,
    *BATCH_RULES,
    _evaluation,
    _streaming,
    _reporting,
    _loss,
    _publishing,
    *RUN_RULES,
    _output,
)
