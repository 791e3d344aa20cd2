"""The source of answers: a base model alone, or a run on it, as the command line and the run's recipe name it.

Nothing is loaded here, so a wrong command line ends before the libraries are imported.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.errors import UserError, quoted
from qwen_vl_sft.modeling.adapter_layout import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    PICKLED_ADAPTER,
    read_adapter_config,
)

if TYPE_CHECKING:
    from qwen_vl_sft.config.reading import Recipe

ARMS = {
    "base": "the base model without a system message of ours",
    "prompted": "the base model with the run's system message",
    "tuned": "the run's adapter on the base model (or its full model), with its system message",
}
ABOUT_ARMS = "Arms\n" + "\n".join(
    textwrap.fill(f"  {arm:<9} {text}", 80, subsequent_indent=" " * 12) for arm, text in ARMS.items()
)
# Keys of a recipe that the command line may give; they win over the run's recipe.
RECIPE_KEYS = (
    "model_name_or_path", "model_revision", "dtype", "load_in_4bit", "load_in_8bit", "load_in_fp8",
    "bnb_4bit_quant_type", "use_bnb_nested_quant", "attn_implementation", "trust_remote_code", "use_safetensors",
    "dataset_name", "dataset_config", "dataset_revision", "image_folder", "dataset_format", "box_coordinates",
    "system_message", "enable_thinking", "min_pixels", "max_pixels", "max_new_tokens", "use_cpu",
)  # fmt: skip
FULL_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class TunedModel:
    """A trained model: `folder` holds an adapter or a full model, `home` the run's recipe.

    The adapter of another trainer has no recipe.
    """

    folder: Path
    home: Path
    is_adapter: bool

    @property
    def recipe_file(self) -> Path | None:
        """Return the run's recipe, None for the adapter of another trainer."""
        from qwen_vl_sft.checkpointing.run_folder import RECIPE

        path = self.home / RECIPE
        return path if path.is_file() else None

    def recipe(self, overrides: Mapping[str, Any]) -> Recipe:
        """Return the run's recipe with `overrides`; for the adapter of another trainer one with its base model alone.

        Raises `UserError`.
        """
        from qwen_vl_sft.config.reading import read_recipe

        if path := self.recipe_file:
            return read_recipe(path, overrides)
        config = read_adapter_config(self.folder)
        named = {"model_name_or_path": config.get("base_model_name_or_path"), "model_revision": config.get("revision")}
        return read_recipe(None, {key: value for key, value in named.items() if value} | dict(overrides))


@dataclass(frozen=True)
class Source:
    """A base model alone, or a run on it, with the recipe and system message to answer with.

    `trained` holds the model settings of training, None without a run of this package. A `system_message` of None leaves
    it to the format of the rows.
    """

    recipe: Recipe
    trained: ModelSettings | None
    tuned: TunedModel | None
    system_message: str | None


def read_source(run: Path | None, recipe_keys: Mapping[str, str], tuned_needed: bool) -> Source:
    """Read a run, if there is one, and override its recipe with `recipe_keys`. Raises `UserError`.

    A model that holds its own system message, as a merged one does, is asked with it.
    """
    from qwen_vl_sft.checkpointing.run_folder import SYSTEM_MESSAGE
    from qwen_vl_sft.config.reading import read_recipe

    tuned = find_tuned(run, tuned_needed) if run else None
    recipe = tuned.recipe(recipe_keys) if tuned else read_recipe(None, recipe_keys)
    if tuned and tuned.is_adapter and not recipe.model.model_name_or_path:
        where = tuned.recipe_file or tuned.folder / ADAPTER_CONFIG
        raise UserError(f"--run: {where} names no base model; name it with --model_name_or_path")
    quantized = [key for key in ("load_in_4bit", "load_in_8bit", "load_in_fp8") if getattr(recipe.model, key)]
    if len(quantized) > 1:
        raise UserError(f"{' and '.join(quantized)} are both on; turn one off, e.g. --{quantized[0]} false")
    if recipe.run.max_new_tokens < 1:
        raise UserError(
            f"max_new_tokens: {recipe.run.max_new_tokens} is below 1, so nothing would be answered; give more"
        )
    message = recipe_keys.get("system_message")
    if message is not None:
        check_text(message, "--system_message")
    elif tuned:
        file = tuned.home / SYSTEM_MESSAGE
        # As Python reads the command line: bytes that are not UTF-8 become lone surrogates.
        message = file.read_text(encoding="utf-8", errors="surrogateescape") if file.exists() else ""
        check_text(message, str(file))
    elif (trained := Path(str(recipe.model.model_name_or_path)) / SYSTEM_MESSAGE).is_file():
        # A merged model, or one that was trained in full: asked without its prompt it answers worse.
        message = trained.read_text(encoding="utf-8", errors="surrogateescape")
        check_text(message, str(trained))
    return Source(recipe, tuned.recipe({}).model if tuned and tuned.recipe_file else None, tuned, message)


def find_tuned(run: Path, needed: bool) -> TunedModel:
    """Find the model in a run folder, in a checkpoint, or in a folder of PEFT.

    Raises `UserError` when it is no run or not finished.
    """
    from qwen_vl_sft.checkpointing.run_folder import RECIPE

    if not run.is_dir():
        near = sorted(str(path.parent) for path in run.parent.glob(f"*/{RECIPE}"))
        raise UserError(
            f"--run: {run} does not exist" + (f"; there are {', '.join(near)}" if near else "; train one first")
        )
    # A link to a checkpoint, or `.` inside one, has the checkpoint's name once it is resolved.
    named = run if run.name.startswith("checkpoint-") else run.resolve()
    home = named.parent if named.name.startswith("checkpoint-") and not (run / RECIPE).is_file() else run
    is_adapter = (run / ADAPTER_FILE).is_file()
    if (run / PICKLED_ADAPTER).is_file() and not is_adapter:
        raise UserError(
            f"--run: {run} holds its adapter as {PICKLED_ADAPTER}, a pickle, which can run code as it is read; load it"
            f" with PEFT where you trust it, and save_pretrained writes {ADAPTER_FILE}"
        )
    if not (home / RECIPE).is_file() and not (is_adapter and (run / ADAPTER_CONFIG).is_file()):
        raise UserError(
            f"--run: {run} holds no {RECIPE}, so it is not a run folder of scripts/sft.py, and no {ADAPTER_FILE} with its"
            f" {ADAPTER_CONFIG} of another trainer; name one"
        )
    if needed and not is_adapter and not any((run / name).is_file() for name in FULL_MODEL_FILES):
        checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        instead = f"evaluate its checkpoint with --run {checkpoints[-1]}, " if checkpoints else ""
        raise UserError(
            f"--run: {run} holds neither {ADAPTER_FILE} nor a full model, so its training did not finish;"
            f" finish it, {instead}or score the base model alone with --arms base,prompted"
        )
    return TunedModel(run, home, is_adapter)


def tuned_settings(settings: ModelSettings, tuned: TunedModel) -> ModelSettings:
    """Return the model settings of the "tuned" arm: the base's for an adapter, else the run's full model's."""
    return (
        settings if tuned.is_adapter else replace(settings, model_name_or_path=str(tuned.folder), model_revision="main")
    )


def unknown_arms(arms: Sequence[str]) -> list[str]:
    """Return a problem for each arm that does not exist."""
    problems = []
    for arm in arms:
        if arm not in ARMS:
            near = difflib.get_close_matches(arm, ARMS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(ARMS)}"
            problems.append(f"--arms: unknown arm {quoted(arm)}; {hint}")
    return problems


def check_one_base(sources: Sequence[Source]) -> None:
    """Raise `UserError` unless all runs share one base model in one precision."""
    first = sources[0]
    problems = []
    for source in sources[1:]:
        ours, theirs = _base_of(first.recipe.model), _base_of(source.recipe.model)
        different = [f"{name} {theirs[name]}, not {ours[name]}" for name in ours if ours[name] != theirs[name]]
        if different:
            assert source.tuned
            problems.append(
                f"--run: {source.tuned.folder} has {' and '.join(different)}, but one base model serves all runs; leave it"
                f" out, or give the same to all on the command line (--model_name_or_path, --dtype, --load_in_4bit)"
            )
    if problems:
        raise UserError(*problems)


def _base_of(settings: ModelSettings) -> dict[str, Any]:
    return {
        "model_name_or_path": settings.model_name_or_path,
        "model_revision": settings.model_revision,
        "precision": settings.precision,
    }


def precision_summary(source: Source) -> dict[str, Any]:
    """Return the precision in which the arms answer and in which the run was trained."""
    scored = source.recipe.model.precision
    trained = source.trained.precision if source.trained else None
    return {"scored": scored, "trained": trained, "scored_as_trained": trained is None or scored == trained}


def check_text(text: str, what: str) -> None:
    """Raise `UserError` for a text whose bytes were not UTF-8, which Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8 text; write it in UTF-8") from None
