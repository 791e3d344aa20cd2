"""Check recipe keys whose value is a mapping: lr_scheduler_kwargs, optim_args, gradient_checkpointing_kwargs."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from qwen_vl_sft.config.coercion import expected
from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import first_line, quoted

# Arguments that transformers reads itself, and those of `torch.utils.checkpoint.checkpoint` that a recipe can set.
_CHECKPOINTING: dict[str, type] = {
    "every_n_layers": int,
    "offload": bool,
    "use_reentrant": bool,
    "preserve_rng_state": bool,
    "determinism_check": str,
    "debug": bool,
    "early_stop": bool,
}
# For these transformers silently ignores all arguments.
_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")
_NEED_ARGUMENTS = ("cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay")
_GIVEN_BY_THE_TRAINER = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
# Steps of a trial schedule when the recipe does not set their number.
_MANY_STEPS = 1_000_000

# What transformers reads of `optim_args` (`trainer_optimizer.py`), by the beginning of the optimizer's name. It silently
# ignores all others, and would pass text instead of numbers to bitsandbytes' RMSprop.
OPTIM_ARGS: dict[str, tuple[str, ...]] = {
    "adamw_anyprecision": (
        "use_kahan_summation",
        "momentum_dtype",
        "variance_dtype",
        "compensation_buffer_dtype",
    ),
    "ademamix": ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
    "rmsprop_bnb": (),
    "galore": ("rank", "update_proj_gap", "scale", "proj_type"),
    "apollo": ("rank", "proj", "scale_type", "update_proj_gap", "scale", "proj_type"),
    "grokadamw": ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"),
    "adamw_torch_4bit": ("block_size", "bf16_stochastic_round"),
    "adamw_torch_8bit": ("block_size", "bf16_stochastic_round"),
    "schedule_free": ("weight_lr_power", "r"),
    "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
}
# The module and the package of the optimizers that PyTorch and transformers do not bring themselves.
_OPTIM_PACKAGES: tuple[tuple[str, str, Callable[[str], bool]], ...] = (
    (
        "bitsandbytes",
        "bitsandbytes",
        lambda name: any(part in name for part in ("8bit", "bnb", "lion", "ademamix", "paged")) and "torch" not in name,
    ),
    ("torchao", "torchao", lambda name: name in ("adamw_torch_4bit", "adamw_torch_8bit")),
    ("galore_torch", "galore-torch", lambda name: name.startswith("galore")),
    ("apollo_torch", "apollo-torch", lambda name: name.startswith("apollo")),
    ("lomo_optim", "lomo-optim", lambda name: name in ("lomo", "adalomo")),
    ("grokadamw", "grokadamw", lambda name: name == "grokadamw"),
    ("schedulefree", "schedulefree", lambda name: name.startswith("schedule_free")),
    ("optimi", "torch-optimi", lambda name: name == "stable_adamw"),
    ("torchdistx", "git+https://github.com/pytorch/torchdistx", lambda name: name == "adamw_anyprecision"),
)
_WORDS = (
    *OPTIM_ARGS["adamw_anyprecision"],
    "nesterov",
    "centered",
    "proj_type",
    "proj",
    "scale_type",
    "bf16_stochastic_round",
    "kahan_sum",
    "decouple_lr",
)


def _checkpointing(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    stated = recipe.get("gradient_checkpointing_kwargs") or {}
    yield from _unknown("gradient_checkpointing_kwargs", stated, _CHECKPOINTING)
    for name, hint in _CHECKPOINTING.items():
        if name in stated and type(stated[name]) is not hint:
            yield f"gradient_checkpointing_kwargs: {name}: {quoted(stated[name])} is not {expected(hint)}"
        elif name == "every_n_layers" and stated.get(name, 1) < 1:
            yield f"gradient_checkpointing_kwargs: {name}: {stated[name]} must be at least 1"


def _schedule(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    kind, stated = recipe.get("lr_scheduler_type"), recipe.get("lr_scheduler_kwargs") or {}
    if not stated and kind not in _NEED_ARGUMENTS:
        return
    # They import the Trainer's modules, which take seconds.
    import torch
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR, get_scheduler

    # Those whose functions pass their arguments on.
    schedules: dict[str, Any] = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}
    schedule: Any = schedules.get(kind) or TYPE_TO_SCHEDULER_FUNCTION[kind]
    parameters = inspect.signature(schedule).parameters
    known = [name for name in parameters if name not in _GIVEN_BY_THE_TRAINER and kind not in _WITHOUT_ARGUMENTS]
    unknown = list(_unknown(f"lr_scheduler_kwargs of lr_scheduler_type {kind}", stated, known))
    yield from unknown
    rate, steps = recipe.get("learning_rate"), recipe.get("max_steps")
    if unknown or rate <= 0:
        return
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    try:
        get_scheduler(kind, optimizer, 0, steps if steps > 0 else _MANY_STEPS, stated)
    except Exception as error:  # a missing argument, one of a wrong type, and what each schedule says itself
        yield f"lr_scheduler_type {kind} cannot be made with lr_scheduler_kwargs {stated}: {first_line(error)}"


def _optimizer(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    optimizer, stated = str(getattr(recipe.get("optim"), "value", recipe.get("optim"))), recipe.get("optim_args")
    if not stated:
        return
    pairs = [pair.partition("=") for pair in stated.replace(" ", "").split(",")]
    for name, _, value in pairs:
        if not name or not value or "=" in value:
            yield f"optim_args: {quoted(stated)} is not written name=value, name=value"
            return
    beginning = max(
        (known for known in OPTIM_ARGS if optimizer.removeprefix("paged_").startswith(known)), key=len, default=""
    )
    known = OPTIM_ARGS.get(beginning, ())
    yield from _unknown(f"optim_args of optim {optimizer}", [name for name, _, _ in pairs], known)
    for name, _, value in pairs:
        if name in known and name not in _WORDS and not _is_number(value):
            yield f"optim_args: {name}: {quoted(value)} is not a number"


def _optimizer_package(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    optimizer = str(getattr(recipe.get("optim"), "value", recipe.get("optim")))
    for module, package, belongs in _OPTIM_PACKAGES:
        if belongs(optimizer) and importlib.util.find_spec(module) is None:
            yield f"optim: {optimizer} needs {package}, which is not installed; pip install {package}, or use adamw_torch"


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _unknown(where: str, stated: Iterable[str], known: Collection[str]) -> Iterator[str]:
    for name in stated:
        if name in known:
            continue
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}" if known else "it reads none"
        yield f"{where}: unknown key {name}; {hint}"


SCHEDULER_AND_OPTIMIZER_RULES = (_checkpointing, _schedule, _optimizer, _optimizer_package)
