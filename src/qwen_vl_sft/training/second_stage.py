"""Start a run from the adapter of an earlier one: a second stage, with an optimizer and a schedule of its own.

Three ways to go on from a run are told apart: `init_adapter` trains its adapter further as a new run; merging it
(scripts/merge.py) and naming the merged model in `model_name_or_path` trains a new adapter on top; and
`resume_from_checkpoint` goes on with the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from qwen_vl_sft.checkpointing.run_folder import RECIPE
from qwen_vl_sft.config.reading import Recipe, read_recipe
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import UserError, quoted, raise_all
from qwen_vl_sft.inference.source import FULL_MODEL_FILES
from qwen_vl_sft.inference.trained_base import check_same_base
from qwen_vl_sft.merging.adapter import adapter_config
from qwen_vl_sft.modeling.adapter_layout import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapted_layers,
    adapter_keys,
    bare,
    in_our_layout,
    read_adapter_config,
)
from qwen_vl_sft.modeling.lora import EXPERTS
from qwen_vl_sft.training.hub_adapter import adapter_folder, is_on_hub, pinned

KEY = "init_adapter"
# Keys of a recipe that an adapter settles, and PEFT's names of them. Dropout is free: it is none of the weights.
_SETTLED = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "lora_modules_to_save": "modules_to_save",
}


@dataclass(frozen=True)
class InitAdapter:
    """The adapter that a run starts from: its folder, the run folder around it, its configuration, and its run's recipe.

    `recipe` is None for an adapter that another program wrote.
    """

    folder: Path
    home: Path
    config: dict[str, Any]
    recipe: Recipe | None

    @property
    def base(self) -> str | None:
        """Return the base model that it was trained on, as its files name it."""
        named: str | None = self.config.get("base_model_name_or_path")
        return (self.recipe.model.model_name_or_path if self.recipe else None) or named

    @property
    def revision(self) -> str:
        """Return the revision of the base model."""
        return (self.recipe.model.model_revision if self.recipe else self.config.get("revision")) or "main"


def with_init_adapter(recipe: Recipe) -> Recipe:
    """Return the recipe with what the adapter that it starts from settles: the base model, rank, scale and layers.

    A folder with an adapter as `model_name_or_path` means the same as `init_adapter`. Raises `UserError` for what is no
    adapter, and for keys that were stated otherwise than it was trained.
    """
    model = recipe.model
    named = Path(model.model_name_or_path or "").expanduser()
    as_model = bool(model.model_name_or_path) and named.is_dir() and not _is_model(named)
    if as_model and (named / ADAPTER_CONFIG).is_file():
        if model.init_adapter:
            raise UserError(
                f"{KEY} and model_name_or_path both name an adapter; keep {KEY}, and name the base model or leave it out"
            )
        model = replace(model, init_adapter=str(named), model_name_or_path=None)
    elif as_model and (named / RECIPE).is_file():
        raise UserError(f"model_name_or_path: {_unfinished(named)}")
    if not model.init_adapter:
        return recipe
    if not model.use_peft:
        raise UserError(
            f"use_peft: false with the adapter {model.init_adapter}: full training needs a whole model; merge the adapter"
            f" with scripts/merge.py, and name the merged model in model_name_or_path"
        )
    # Of one on the Hub the commit is named, so that a resumed run starts from the same.
    model = replace(model, init_adapter=pinned(model.init_adapter))
    start = read_init_adapter(adapter_folder(str(model.init_adapter)))
    raise_all([*_other_keys(recipe, start)])
    settled: dict[str, Any] = {name: start.config.get(theirs) or None for name, theirs in _SETTLED.items()}
    settled |= {name: bool(settled[name]) for name in ("use_rslora", "use_dora")}
    settled["lora_modules_to_save"] = _saved_modules(start)
    if "lora_scope" not in recipe.stated and (start.recipe or start.config.get("target_parameters")):
        settled["lora_scope"] = start.recipe.model.lora_scope if start.recipe else EXPERTS
    model = replace(model, **settled, lora_target_modules=_targets(recipe, start))
    if not is_on_hub(str(model.init_adapter)):
        model = replace(model, init_adapter=str(start.folder))
    if model.model_name_or_path is None:
        if start.base is None:
            raise UserError(f"{KEY}: {start.folder} does not name its base model; name it in model_name_or_path")
        model = replace(model, model_name_or_path=start.base, model_revision=start.revision)
    else:
        check_same_base(
            start.folder, start.home, start.base, model, KEY, "name the base model it was trained on, or leave it out"
        )
    return replace(recipe, model=model)


def read_init_adapter(folder: Path) -> InitAdapter:
    """Read the adapter in a run folder, a checkpoint, or a folder of PEFT. Raises `UserError`."""
    if not folder.is_dir():
        raise UserError(f"{KEY}: {folder} is not a folder here; name a run folder, a checkpoint, or a folder of PEFT")
    if _is_model(folder):
        raise UserError(
            f"{KEY}: {folder} holds a whole model and no adapter; name it in model_name_or_path to start from it"
        )
    if not (folder / ADAPTER_CONFIG).is_file() or not (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{KEY}: {_unfinished(folder)}")
    home = folder.parent if not (folder / RECIPE).is_file() and (folder.parent / RECIPE).is_file() else folder
    recipe = read_recipe(home / RECIPE, {}) if (home / RECIPE).is_file() else None
    adapter_config(folder, KEY)
    config = read_adapter_config(folder, KEY)
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise UserError(
                f"{KEY}: the adapter in {folder} has {name}, which a recipe cannot state; merge it with scripts/merge.py,"
                f" and name the merged model in model_name_or_path"
            )
    return InitAdapter(folder, home, config, recipe)


def problems_of_init_adapter(recipe: Recipe, context: DistributedContext) -> Iterator[str]:
    """Tell where an adapter cannot be loaded as launched."""
    if recipe.model.init_adapter and recipe.model.lora_modules_to_save and context.strategy == "zero3":
        yield (
            f"{KEY} with lora_modules_to_save does not run under zero3, which has split these layers by then; launch ddp,"
            f" zero2 or fsdp2"
        )


def check_fits(settings: ModelSettings, targets: tuple[str, ...]) -> None:
    """Raise `UserError` unless the adapter that a run starts from is on exactly the layers `targets`."""
    if not settings.init_adapter:
        return
    found = adapted_layers(adapter_keys(adapter_folder(settings.init_adapter), KEY))
    wanted = {bare(target) for target in targets}
    for left, what in ((found - wanted, "the adapter has"), (wanted - found, "the recipe puts LoRA on")):
        if left:
            raise UserError(
                f"{KEY}: {settings.init_adapter} and the recipe differ in their layers: {what} {len(left)} that the other"
                f" has not, such as {min(left)}; leave lora_target_modules and lora_scope out, or name the base model that"
                f" it was trained on"
            )


def load_init_adapter(model: Any, settings: ModelSettings) -> None:
    """Give a model's new adapter the weights that the run starts from. Raises `UserError` unless each has its place."""
    if not settings.init_adapter:
        return
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    folder = adapter_folder(settings.init_adapter)
    with in_our_layout(folder, model, KEY) as placed:
        saved = load_file(placed / ADAPTER_FILE)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    problems = [f"{name} has no place in it" for name in sorted(saved.keys() - expected.keys())]
    problems += [f"{name} is missing" for name in sorted(expected.keys() - saved.keys())]
    problems += [
        f"{name} is {tuple(saved[name].shape)}, not {tuple(expected[name].shape)}"
        for name in sorted(saved.keys() & expected.keys())
        if saved[name].shape != expected[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"{KEY}: the adapter in {folder} does not fit the model: {problems[0]}{more}; name the base model that it was"
            f" trained on"
        )
    set_peft_model_state_dict(model, saved)


def _other_keys(recipe: Recipe, start: InitAdapter) -> Iterator[str]:
    for name, theirs in _SETTLED.items():
        stated, trained = getattr(recipe.model, name), start.config.get(theirs)
        trained = _saved_modules(start) if name == "lora_modules_to_save" else trained
        if name in recipe.stated and (stated or None) != (trained or None):
            yield (
                f"{name}: {quoted(stated)}, and the adapter in {start.folder} has {quoted(trained)}; leave {name} out, or"
                f" merge the adapter with scripts/merge.py and train a new one on the merged model"
            )


def _saved_modules(start: InitAdapter) -> list[str] | None:
    """Return the modules that an adapter saves whole, by names that match in every layout."""
    return [bare(name) or name for name in start.config.get("modules_to_save") or ()] or None


def _targets(recipe: Recipe, start: InitAdapter) -> list[str] | None:
    """Return `lora_target_modules` of the recipe, else of the adapter's own run, else names for its layers alone."""
    if "lora_target_modules" in recipe.stated:
        return recipe.model.lora_target_modules
    if start.recipe:
        return start.recipe.model.lora_target_modules
    # Those on experts are named by lora_scope.
    layers = adapted_layers(adapter_keys(start.folder, KEY))
    return sorted(name for name in layers if not name.endswith(f".{EXPERTS}"))


def _is_model(folder: Path) -> bool:
    whole = any((folder / name).is_file() for name in FULL_MODEL_FILES)
    return whole or ((folder / "config.json").is_file() and not (folder / ADAPTER_CONFIG).is_file())


def _unfinished(folder: Path) -> str:
    saved = sorted(
        (path.parent for path in folder.glob(f"checkpoint-*/{ADAPTER_FILE}")), key=lambda path: path.stat().st_mtime
    )
    if saved:
        return (
            f"{folder} holds no finished model; finish its run with --resume_from_checkpoint latest, or start from its"
            f" checkpoint with --{KEY} {saved[-1]}"
        )
    return f"{folder} holds no {ADAPTER_FILE} with its {ADAPTER_CONFIG}; name a finished run, a checkpoint or a PEFT adapter"
