"""Check a recipe as a whole, and list the rules of all folders; all problems are reported at once."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

from transformers.utils.logging import get_log_levels_dict

from qwen_vl_sft.checkpointing.resume_rules import RESUME_RULES
from qwen_vl_sft.config.batch_rules import BATCH_RULES
from qwen_vl_sft.config.model_rules import IDLE_RULES, MODEL_RULES
from qwen_vl_sft.config.range_rules import RANGE_RULES
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import quoted
from qwen_vl_sft.evaluation.metrics import ALL_METRICS
from qwen_vl_sft.modeling.model_rules import DEVICE_RULES
from qwen_vl_sft.publishing.hub_rules import HUB_RULES
from qwen_vl_sft.resilience.run_rules import RUN_RULES
from qwen_vl_sft.training.scheduler_and_optimizer_rules import SCHEDULER_AND_OPTIMIZER_RULES

# What every evaluation measures while training; those of `ALL_METRICS` come with predict_with_generate.
EVALUATION_METRICS = ("loss", "mean_token_accuracy")


def problems_of(recipe: Recipe, context: DistributedContext) -> list[str]:
    """Return everything that cannot work in this recipe as launched, as far as neither model nor data are needed."""
    return [problem for rule in RULES for problem in rule(recipe, context)]


def _required(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    stated = {
        # An adapter names its base model.
        "model_name_or_path": recipe.model.model_name_or_path or recipe.model.init_adapter,
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


def _evaluation(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    evaluates = recipe.get("eval_strategy") != "no"
    if evaluates and not recipe.data.dataset_test_split:
        yield "eval_strategy is set but dataset_test_split is not: name the split to evaluate on, or set eval_strategy: no"
    if recipe.get("save_strategy") == "best" and not evaluates:
        yield "save_strategy: best saves only after evaluations: set eval_strategy and dataset_test_split"
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
    """Refuse intervals as transformers would. Below 1 they are shares of all steps."""
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
    known = (*EVALUATION_METRICS, *ALL_METRICS)
    if metric not in known:
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(known)}"
        yield f"metric_for_best_model: {quoted(stated)} is not measured; {hint}"
    elif metric in ALL_METRICS and not recipe.run.predict_with_generate:
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


def _reporting(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
    report_to = recipe.get("report_to")
    names = report_to if isinstance(report_to, list) else [report_to]
    for name in names:
        if name in packages and importlib.util.find_spec(packages[name]) is None:
            yield f"report_to: {name} is not installed; pip install {packages[name]}, or remove it"
        elif name == "none" and len(names) > 1:
            yield "report_to: none is combined with others; use only none, or remove it"
        elif name not in packages and name != "none":
            yield f"report_to: {quoted(name)} is unknown; tensorboard, wandb, trackio or none"
    levels = (*get_log_levels_dict(), "passive")
    for key in ("log_level", "log_level_replica"):
        if recipe.get(key) not in levels:
            yield f"{key}: {quoted(recipe.get(key))} is unknown; one of {', '.join(levels)}"


def _loss(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    if recipe.get("loss_type") not in ("nll", "dft"):
        yield f"loss_type: {quoted(recipe.get('loss_type'))} is unknown; nll or dft"


RULES: tuple[Callable[[Recipe, DistributedContext], Iterator[str]], ...] = (
    _required,
    *RANGE_RULES,
    *SCHEDULER_AND_OPTIMIZER_RULES,
    *MODEL_RULES,
    *IDLE_RULES,
    *DEVICE_RULES,
    *BATCH_RULES,
    _evaluation,
    _streaming,
    _reporting,
    _loss,
    *HUB_RULES,
    *RUN_RULES,
    *RESUME_RULES,
)
