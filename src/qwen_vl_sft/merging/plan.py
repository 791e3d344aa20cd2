"""Command-line options of merge.py, and the plan of a merge: which run, and which base model."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qwen_vl_sft.config.command_line import REQUIRED, option, size
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.inference.source import FULL_MODEL_FILES, TunedModel, find_tuned
from qwen_vl_sft.modeling.adapter_layout import ADAPTER_CONFIG, read_adapter_config

if TYPE_CHECKING:
    from qwen_vl_sft.config.reading import Recipe

REPORT_FILE = "merge.json"
Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class MergeOptions:
    """Command-line options of merge.py; `max_shard_size` in bytes."""

    run: Path = option(REQUIRED, "run folder of scripts/sft.py, or a checkpoint in it", metavar="folder")
    output_dir: Path = option(REQUIRED, "a new or empty folder for the merged model", metavar="folder")
    base: str | None = option(
        None, "base model, Hub id or local folder; default: the run's base model", metavar="model"
    )
    dtype: Dtype = option("bfloat16", "precision of the merged weights")
    nf4_aware: bool = option(
        False, "add the adapter to the 4-bit weights it was trained on, dequantized, instead of the original ones"
    )
    fp8_aware: bool = option(
        False, "add the adapter to the FP8 weights it was trained on, dequantized, instead of the original ones"
    )
    max_shard_size: int = option(4 * 10**9, "largest weight file, such as 500MB", parse=size, shown="4GB")
    samples: int = option(4, "rows to compare logits and answers on; 0 for none", at_least=0)


@dataclass(frozen=True)
class MergePlan:
    """A merge that is ready to start: `base` says where the 16-bit base comes from, `trained` how training loaded it."""

    options: MergeOptions
    recipe: Recipe
    tuned: TunedModel
    base: ModelSettings
    trained: ModelSettings

    @property
    def trained_quantized(self) -> bool:
        """Return whether training held the base in 4 or 8 bits."""
        return bool(self.trained.load_in_4bit or self.trained.load_in_8bit or self.trained.load_in_fp8)

    @property
    def keeps_trained(self) -> bool:
        """Return whether the adapter is added to the quantized weights of training."""
        return self.options.nf4_aware or self.options.fp8_aware

    @property
    def on_cpu(self) -> bool:
        """Return whether to quantize and compare on the CPU: without a GPU, or for a run with `use_cpu`."""
        import torch

        return not torch.cuda.is_available() or bool(self.recipe.get("use_cpu"))


def make_plan(options: MergeOptions) -> MergePlan:
    """Read the run. Raises `UserError` when there is nothing to merge or nowhere to write; writes nothing."""
    check_output_dir(options.output_dir)
    if (options.run / REPORT_FILE).is_file():
        raise UserError(f"--run: {options.run} is a merged model already; name the run folder with the adapter")
    tuned = find_tuned(options.run, needed=True)
    if not tuned.is_adapter:
        model_file = next(name for name in FULL_MODEL_FILES if (options.run / name).is_file())
        raise UserError(
            f"--run: {options.run} holds a full model ({model_file}) and no adapter, so there is nothing to merge;"
            f" use it as it is"
        )
    recipe = tuned.recipe({})
    if options.nf4_aware and not recipe.model.load_in_4bit:
        raise UserError(
            f"--nf4_aware: the run in {tuned.home} was not trained on 4-bit weights (load_in_4bit), as far as it says, so it"
            f" would change the base for nothing; leave it out"
        )
    if options.fp8_aware and not recipe.model.load_in_fp8:
        raise UserError(
            f"--fp8_aware: the run in {tuned.home} was not trained on FP8 weights (load_in_fp8), as far as it says, so it"
            f" would change the base for nothing; leave it out"
        )
    found = find_base(options, tuned, recipe.model)
    base = replace(found, load_in_4bit=False, load_in_8bit=False, load_in_fp8=False, dtype=options.dtype)
    trained = replace(recipe.model, model_name_or_path=base.model_name_or_path, model_revision=base.model_revision)
    return MergePlan(options, recipe, tuned, base, trained)


def find_base(options: MergeOptions, tuned: TunedModel, settings: ModelSettings) -> ModelSettings:
    """Return the recipe's model settings with the base to merge into: --base, else the base of the adapter and the recipe."""
    from qwen_vl_sft import tiny
    from qwen_vl_sft.config.reading import resolve_builtin

    if options.base:
        stated = str(tiny.BUILTIN.get(options.base, os.path.expanduser(options.base)))
        same = stated == settings.model_name_or_path
        return replace(settings, model_name_or_path=stated, model_revision=settings.model_revision if same else "main")
    config = read_adapter_config(tuned.folder)
    name: str | None = config.get("base_model_name_or_path")
    name = resolve_builtin(name) if name else None
    if name and settings.model_name_or_path and name != settings.model_name_or_path:
        raise UserError(
            f"--run: {tuned.folder / ADAPTER_CONFIG} names the base {name}, the recipe next to it"
            f" {settings.model_name_or_path}; say which one with --base"
        )
    name = name or settings.model_name_or_path
    if not name:
        raise UserError(
            f"--run: neither the adapter nor the recipe in {tuned.home} names a base model; give it with --base"
        )
    return replace(settings, model_name_or_path=name, model_revision=config.get("revision") or settings.model_revision)


def check_output_dir(folder: Path) -> None:
    """Raise `UserError` when something is there already."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir: {folder} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        what = "a merged model" if (folder / REPORT_FILE).is_file() else "files"
        raise UserError(f"--output_dir: {folder} holds {what} already; delete the folder, or name another one")
