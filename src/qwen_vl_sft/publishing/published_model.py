"""The model to publish: a run's adapter, its full model, or a merged model, with what the run's files say about it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_vl_sft.checkpointing.checkpoints import is_checkpoint_name, step_of
from qwen_vl_sft.checkpointing.run_folder import ENVIRONMENT, METRICS, RECIPE, SYSTEM_MESSAGE
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.scoring import SUMMARY_FILE, with_current_names
from qwen_vl_sft.inference.source import ADAPTER_FILE, find_tuned
from qwen_vl_sft.merging.plan import REPORT_FILE as MERGE_FILE
from qwen_vl_sft.modeling.adapter_layout import read_adapter_config
from qwen_vl_sft.publishing.names import hub_id, public_base
from qwen_vl_sft.publishing.results import (
    check_evaluated_base,
    check_evaluation,
    find_evaluation,
    other_prompt,
    same_folder,
    settings_differences,
)
from qwen_vl_sft.serving.record import changes_vision, valid_records

if TYPE_CHECKING:
    from qwen_vl_sft.config.reading import Recipe

Kind = Literal["adapter", "full model", "merged model"]
TRAINER_STATE = "trainer_state.json"
# The pixel limits, and what a processor's `size` calls them.
SIZE_NAMES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}


@dataclass(frozen=True)
class PublishedModel:
    """A model to publish and what its run's files say about it.

    `folder` holds the weights, `home` the run's recipe. `base` is a Hub id, `builtin:NAME`, or None for a local folder.
    `evaluation` is the summary.json of scripts/evaluate.py, `step` the step of a checkpoint, and `pixel_limits` the
    `min_pixels` and `max_pixels` of the processor, `template_options` arguments of its chat template. `changes_vision`
    tells whether an adapter reaches the vision part, and `serving` holds what scripts/serve_check.py found of these weights.
    """

    kind: Kind
    folder: Path
    home: Path
    recipe: Recipe
    base: str | None
    base_revision: str | None
    metrics: dict[str, Any] | None
    environment: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    evaluation_folder: Path | None
    merge: dict[str, Any] | None
    adapter: dict[str, Any] | None
    system_message: str
    pixel_limits: dict[str, int]
    template_options: dict[str, bool]
    step: int | None
    changes_vision: bool
    serving: tuple[dict[str, Any], ...]

    @property
    def is_adapter(self) -> bool:
        """Return whether the base model is needed to use it."""
        return self.kind == "adapter"

    @property
    def base_on_hub(self) -> str | None:
        """Return the base model's id if it is on the Hub."""
        return hub_id(self.base)

    @property
    def step_of_weights(self) -> int | None:
        """Return the step of a finished run's weights, which may be an earlier one, that of the best evaluation."""
        metrics = self.metrics or {}
        if "step_of_weights" in metrics:
            return int(metrics["step_of_weights"])
        # A run of an earlier version names the checkpoint alone.
        best = Path(str(metrics.get("best_checkpoint"))).name
        if self.recipe.get("load_best_model_at_end") and is_checkpoint_name(best):
            return step_of(Path(best))
        return metrics.get("steps")

    @property
    def evaluated_as_published(self) -> bool:
        """Return whether these weights were evaluated, and not the adapter that was merged into them."""
        if self.evaluation is None or self.evaluation_folder is None:
            return False
        inside = same_folder(str(self.evaluation_folder.parent), self.folder)
        return self.kind != "merged model" or inside or same_folder(self.evaluation["settings"]["run"], self.folder)

    @property
    def evaluated_with_its_prompt(self) -> bool:
        """Return whether an evaluation used the published system message."""
        return self.evaluation is not None and not other_prompt(self.evaluation, self.system_message)

    @property
    def evaluated_otherwise(self) -> list[str]:
        """Return in which settings the evaluation differs from the published ones, in words."""
        if self.evaluation is None:
            return []
        thinking = self.recipe.data.enable_thinking
        return settings_differences(self.evaluation, self.system_message, self.pixel_limits, thinking)


def read_published_model(
    run: Path, model: Path | None = None, evaluation: Path | None = None, base_model: str | None = None
) -> PublishedModel:
    """Read the model to publish and its run's files. Raises `UserError`; writes nothing.

    Args:
        run: a run folder, a checkpoint in it, or a folder of scripts/merge.py.
        model: a folder of scripts/merge.py, whose model is published instead of the run's adapter.
        evaluation: a folder of scripts/evaluate.py; default: `evaluation` in what is published, or in the run.
        base_model: the Hub id of the base model, for a run that was started from a local folder.
    """
    from qwen_vl_sft.config.reading import read_recipe

    tuned = find_tuned(run, needed=model is None)
    folder = model or tuned.folder
    merge = _read_json(folder / MERGE_FILE, needed=False)
    if model is not None:
        _check_merged(model, merge, run)
    elif run != tuned.home:
        merge = None
    kind: Kind = "merged model" if merge else "adapter" if tuned.is_adapter else "full model"
    adapter = read_adapter_config(folder) if kind == "adapter" else None
    if tuned.recipe_file is None:
        raise UserError(
            f"--run: {run} holds no {RECIPE}: the card of another trainer's adapter would have nothing to say; name a run"
            f" folder of scripts/sft.py"
        )
    recipe = read_recipe(tuned.recipe_file, {})
    base = public_base((adapter or {}).get("base_model_name_or_path") or _base_of(merge, recipe), base_model)
    if base is None and kind == "adapter":
        raise UserError(
            f"--run: the base model of {run} is a folder of this machine, and nobody else could load the adapter without"
            f" it; give the Hub id of the same model with --base_model, e.g. --base_model Qwen/Qwen2-VL-7B-Instruct"
        )
    # The metrics of a run describe its final model, not a checkpoint.
    is_checkpoint = tuned.folder != tuned.home and model is None
    metrics = None if is_checkpoint else _read_json(tuned.home / METRICS, needed=False)
    base_revision = None if base_model else _base_revision(merge, metrics, recipe)
    message = tuned.home / SYSTEM_MESSAGE
    found = find_evaluation(evaluation, [folder, *([tuned.folder] if model else [])])
    summary = _read_json(found / SUMMARY_FILE, needed=True) if found else None
    if summary is not None and found is not None:
        check_evaluation(summary, found, [folder, tuned.folder])
        check_evaluated_base(summary["settings"], found, recipe, (base, _base_of(merge, recipe)), base_revision)
        summary = with_current_names(summary)
    return PublishedModel(
        kind=kind,
        folder=folder,
        home=tuned.home,
        recipe=recipe,
        base=base,
        base_revision=base_revision,
        metrics=metrics,
        environment=_read_json(tuned.home / ENVIRONMENT, needed=False),
        evaluation=summary,
        evaluation_folder=found,
        merge=merge,
        adapter=adapter,
        system_message=message.read_text(encoding="utf-8").strip() if message.is_file() else "",
        pixel_limits=_pixel_limits([folder, tuned.home]),
        template_options=_template_options([folder, tuned.home], recipe),
        step=_step_of(tuned.folder) if is_checkpoint else None,
        changes_vision=kind == "adapter" and changes_vision(folder / ADAPTER_FILE),
        serving=tuple(valid_records(list(dict.fromkeys([folder, tuned.home])), folder)),
    )


def _base_of(merge: dict[str, Any] | None, recipe: Recipe) -> str | None:
    return (merge or {}).get("base") or recipe.model.model_name_or_path


def _base_revision(merge: dict[str, Any] | None, metrics: dict[str, Any] | None, recipe: Recipe) -> str | None:
    """Return the base model's recorded commit, else the revision of the recipe unless it is main, which moves."""
    recorded = (merge or {}).get("base_revision") or (metrics or {}).get("base_commit")
    return recorded or (recipe.model.model_revision if recipe.model.model_revision != "main" else None)


def _check_merged(model: Path, merge: dict[str, Any] | None, run: Path) -> None:
    if merge is None:
        raise UserError(
            f"--model: {model} holds no {MERGE_FILE}, so it was not written by scripts/merge.py; name a merged model"
        )
    origin = Path(merge["run"])
    if origin.is_dir() and not same_folder(str(origin), run):
        raise UserError(f"--model: {model} was merged from {origin}, not from --run {run}; name the run it comes from")


def _step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, also of a renamed folder. Raises `UserError`."""
    if named := re.fullmatch(r"checkpoint-(\d+)", checkpoint.resolve().name):
        return int(named[1])
    step = (_read_json(checkpoint / TRAINER_STATE, needed=False) or {}).get("global_step")
    if not isinstance(step, int):
        raise UserError(
            f"--run: {checkpoint} does not say which step it is of (there is no global_step in a {TRAINER_STATE}); name the"
            f" folder checkpoint-STEP"
        )
    return step


def _read_json(path: Path, needed: bool) -> dict[str, Any] | None:
    if not path.is_file() and not needed:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--run: {path} cannot be read ({error}); fix or delete it") from None
    if not isinstance(value, dict):
        raise UserError(f"--run: {path} does not hold what the scripts write there; fix or delete it")
    return value


def _template_options(folders: Sequence[Path], recipe: Recipe) -> dict[str, bool]:
    """Return the options of the chat template that training and evaluation gave, of those that the template knows."""
    given = {"enable_thinking": recipe.data.enable_thinking, "preserve_thinking": True}
    files = [folder / "chat_template.jinja" for folder in folders]
    text = next((file.read_text(encoding="utf-8") for file in files if file.is_file()), "")
    return {name: value for name, value in given.items() if name in text and "enable_thinking" in text}


def _pixel_limits(folders: Sequence[Path]) -> dict[str, int]:
    """Return `min_pixels` and `max_pixels` of the processor in the first folder that has one; empty if it states none."""
    for folder in folders:
        for name in ("processor_config.json", "preprocessor_config.json"):
            if (folder / name).is_file():
                config = json.loads((folder / name).read_text(encoding="utf-8"))
                size = (config.get("image_processor") or config).get("size") or {}
                return {limit: size[stored] for limit, stored in SIZE_NAMES.items() if size.get(stored)}
    return {}
