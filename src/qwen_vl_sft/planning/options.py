"""Command-line options of plan.py, and the plan that they ask for."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, replace
from pathlib import Path

from qwen_vl_sft.config.command_line import any_recipe_key, names, option, recipe_values
from qwen_vl_sft.config.reading import read_recipe
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.planning.cards import find_card
from qwen_vl_sft.planning.find_rows import row_sizes
from qwen_vl_sft.planning.inputs import find_shape, read_launch
from qwen_vl_sft.planning.rows import RowSizes
from qwen_vl_sft.planning.run import RunPlan, check_launch

# Cards that FlashAttention 3 or 4 runs on, for packed rows.
_FLASH_CARDS = ("H100", "H200", "B200", "GB200")
_FLASH_PACKAGES = ("flash-attn-4", "flash-attn-3")


def plot_file(text: str) -> Path:
    """Return the path of a plot. Raises `ValueError` for a name that says no kind of picture, or without a folder."""
    path = Path(text)
    if path.suffix not in (".png", ".svg", ".pdf") or path.is_dir():
        raise ValueError("is no file name that ends with .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise ValueError("is in a folder that does not exist; make it, or name another")
    return path


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Command-line options of plan.py; other keys go to the recipe."""

    recipe: Path = option(Path("recipes/chartqa_qlora.yaml"), "the recipe that is planned", metavar="file")
    gpu: str = option("h200", "a GPU such as a100-80, or its memory and dense bf16 rate: 48GB:181TFLOPS")
    num_gpus: int | None = option(None, "GPUs in all; default: what the launch file says, else 1", at_least=1)
    config_file: str | None = option(None, "launch configuration, or its name: ddp, zero2, fsdp2", metavar="file")
    rows: int | None = option(None, "training rows, where the data is not on this machine", at_least=1)
    row_tokens: int | None = option(None, "tokens of a row, images included", at_least=1)
    image_tokens: int | None = option(None, "tokens of a row's images", at_least=0)
    json: bool = option(False, "print JSON")
    plot: Path | None = option(
        None, "draw memory over tokens_per_batch: a .png, .svg or .pdf", metavar="file", parse=plot_file
    )
    recipe_keys: dict[str, list[str]] = any_recipe_key()


def plan_of(options: PlanOptions) -> RunPlan:
    """Build the plan. Raises `UserError` for a recipe, a launch file, a model or a GPU that cannot be used."""
    recipe = read_recipe(options.recipe, recipe_values(options.recipe_keys))
    card, launch = find_card(options.gpu), read_launch(options.config_file, options.num_gpus)
    model = recipe.model.model_name_or_path
    if model is None:
        raise UserError(f"{options.recipe}: model_name_or_path is missing; name a Hub id or a local folder")
    shape = find_shape(model, recipe.model.model_revision)
    rows = _stated(row_sizes(recipe.data, model, shape.vision), options)
    flash = recipe.model.attn_implementation == "auto" and card.name.split()[0] in _FLASH_CARDS and _has_flash()
    plan = RunPlan(recipe, shape, rows, card, launch, flash)
    check_launch(plan)
    return plan


def _has_flash() -> bool:
    for package in _FLASH_PACKAGES:
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return True
    return False


def _stated(rows: RowSizes, options: PlanOptions) -> RowSizes:
    """Return the sizes with what the command line states."""
    if options.rows is not None:
        rows = replace(rows, rows=options.rows, source=f"{rows.source}; --rows")
    if options.image_tokens is not None:
        patches, share = options.image_tokens * 4.0, options.image_tokens * 4.0 / max(rows.patches, 1e-9)
        tokens = rows.tokens + (patches - rows.patches) / 4
        rows = _of_tokens(rows, tokens)
        rows = replace(rows, patches=patches, patches_squared=rows.patches_squared * share**2)
        rows = replace(rows, source=f"{rows.source}; --image_tokens")
    if options.row_tokens is not None:
        if options.row_tokens < rows.patches / 4:
            raise UserError(
                f"--row_tokens {options.row_tokens}: a row's images alone have {rows.patches / 4:.0f}; add --image_tokens"
            )
        rows = replace(_of_tokens(rows, options.row_tokens), source=f"{rows.source}; --row_tokens")
    if None not in (options.rows, options.image_tokens, options.row_tokens):
        rows = replace(rows, source="as --rows, --image_tokens and --row_tokens say")
    # No more than there is text.
    return replace(rows, opening=min(rows.opening, max(0, int(rows.tokens - rows.patches / 4))))


def _of_tokens(rows: RowSizes, tokens: float) -> RowSizes:
    share = tokens / rows.tokens
    squared, longest = rows.tokens_squared * share**2, round(rows.longest * share)
    return replace(rows, tokens=tokens, tokens_squared=squared, longest=longest)


@dataclass(frozen=True, kw_only=True)
class CheckPlanOptions:
    """Command-line options of check_plan.py; other keys go to the recipe of the runs that are measured."""

    points: Path = option(Path("benchmarks/plan.json"), "the measured runs", metavar="file")
    measure: Path | None = option(
        None, "measure runs on this GPU, write them into this file, and compare with these", metavar="file"
    )
    processor: str | None = option(
        None, "local folder or Hub id of the processor of the measured models", metavar="model"
    )
    recipe: Path = option(Path("recipes/chartqa_qlora.yaml"), "the recipe that is measured", metavar="file")
    model_dir: Path = option(
        Path("models"), "where random models are made, and removed when they are not needed any more", metavar="folder"
    )
    models: tuple[str, ...] = option((), "measure these alone, e.g. Qwen2-VL-7B", parse=names, shown="all")
    methods: tuple[str, ...] = option((), "measure these alone: QLoRA,LoRA,full", parse=names, shown="all")
    warmup: int = option(6, "first steps of a run, whose time does not count", at_least=1)
    steps: int = option(6, "last steps of a run, whose time counts once they are alike", at_least=1)
    most_steps: int = option(30, "steps after which a run ends even so", at_least=1)
    seconds: float = option(3600.0, "seconds after which no more run begins", at_least=0)
    recipe_keys: dict[str, list[str]] = any_recipe_key()
