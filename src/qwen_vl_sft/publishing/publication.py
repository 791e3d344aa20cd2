"""What is published: a run's adapter, its full model, or a merged model, with the files of the run that describe it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_vl_sft.checkpointing.run_folder import ENVIRONMENT, METRICS, RECIPE, SYSTEM_MESSAGE
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.scoring import SUMMARY_FILE
from qwen_vl_sft.inference.source import find_tuned
from qwen_vl_sft.merging.plan import REPORT_FILE as MERGE_FILE
from qwen_vl_sft.merging.plan import read_adapter_config
from qwen_vl_sft.publishing.names import hub_id, problem_of_repo_id, public_name

if TYPE_CHECKING:
    from qwen_vl_sft.config.reading import Recipe

Kind = Literal["adapter", "full model", "merged model"]
BUILTIN_PREFIX = "builtin:"
TRAINER_STATE = "trainer_state.json"
# How far, in seconds, weights may be younger than their evaluation: a copied folder has the times of the copy.
_COPIED = 60


@dataclass(frozen=True)
class Publication:
    """A model to publish and what its run's files say about it.

    `folder` holds the weights, `home` the run's recipe; `base` is a Hub id, `builtin:NAME`, or None when the base is a
    local folder. `evaluation` is a summary of `scripts/evaluate.py`, and `step` the step of a checkpoint.
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
    step: int | None

    @property
    def is_adapter(self) -> bool:
        """Whether the base model is needed to use it."""
        return self.kind == "adapter"

    @property
    def base_on_hub(self) -> str | None:
        """The base model's id when others find it on the Hub."""
        return hub_id(self.base)

    @property
    def evaluated_as_published(self) -> bool:
        """Whether the evaluation is of these very weights, and not of the adapter that was merged into them."""
        if self.evaluation is None or self.evaluation_folder is None:
            return False
        inside = _same(str(self.evaluation_folder.parent), self.folder)
        return self.kind != "merged model" or inside or _same(self.evaluation["settings"]["run"], self.folder)


def read_publication(
    run: Path, model: Path | None = None, evaluation: Path | None = None, base_model: str | None = None
) -> Publication:
    """Read what is to be published. Raises `UserError` with the way out; writes nothing.

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
    recipe = read_recipe(tuned.home / RECIPE, {})
    base = _public_base((adapter or {}).get("base_model_name_or_path") or _base_of(merge, recipe), base_model)
    if base is None and kind == "adapter":
        raise UserError(
            f"--run: the base model of {run} is a folder of this machine, and nobody else could load the adapter without"
            f" it; give the Hub id of the same model with --base_model, e.g. --base_model Qwen/Qwen2-VL-7B-Instruct"
        )
    # A checkpoint lies before the end of its run: what that says of the final model is not about it.
    is_checkpoint = tuned.folder != tuned.home and model is None
    metrics = None if is_checkpoint else _read_json(tuned.home / METRICS, needed=False)
    base_revision = None if base_model else _base_revision(merge, metrics, recipe)
    message = tuned.home / SYSTEM_MESSAGE
    found = _find_evaluation(evaluation, [folder, *([tuned.folder] if model else [])])
    summary = _read_json(found / SUMMARY_FILE, needed=True) if found else None
    if summary is not None and found is not None:
        _check_evaluation(summary, found, [folder, tuned.folder])
        _check_evaluated_base(summary["settings"], found, recipe, (base, _base_of(merge, recipe)), base_revision)
    return Publication(
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
        step=_step_of(tuned.folder) if is_checkpoint else None,
    )


def problem_of_base(model: str | None, use_peft: bool) -> str | None:
    """Why a run on this base model could not be published when it ends, None when it can."""
    if model and use_peft and _public_base(model, None) is None:
        return (
            f"push_to_hub: the base model {model} is a local folder, and nobody else could load the adapter without it; set"
            f" model_name_or_path to its Hub id, or publish after training with scripts/push.py and --base_model"
        )
    return None


def _public_base(name: str | None, stated: str | None) -> str | None:
    if stated is not None:
        problem = problem_of_repo_id(stated) or (None if hub_id(stated) else f"{stated} is a folder here, not a Hub id")
        if problem:
            raise UserError(f"--base_model: {problem}")
        return stated
    public = public_name(name) if name else None
    return public if public and (hub_id(public) or public.startswith(BUILTIN_PREFIX)) else None


def _base_of(merge: dict[str, Any] | None, recipe: Recipe) -> str | None:
    return (merge or {}).get("base") or recipe.model.model_name_or_path


def _base_revision(merge: dict[str, Any] | None, metrics: dict[str, Any] | None, recipe: Recipe) -> str | None:
    """The commit of the base model where it is recorded, else the revision asked for; main moves, so it says nothing."""
    recorded = (merge or {}).get("base_revision") or (metrics or {}).get("base_commit")
    return recorded or (recipe.model.model_revision if recipe.model.model_revision != "main" else None)


def _check_merged(model: Path, merge: dict[str, Any] | None, run: Path) -> None:
    if merge is None:
        raise UserError(f"--model: {model} holds no {MERGE_FILE}, so it is no folder of scripts/merge.py; name one")
    origin = Path(merge["run"])
    if origin.is_dir() and not _same(str(origin), run):
        raise UserError(f"--model: {model} was merged from {origin}, not from --run {run}; name the run it comes from")


def _step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, also where its folder was given another name. Raises `UserError`."""
    if named := re.fullmatch(r"checkpoint-(\d+)", checkpoint.resolve().name):
        return int(named[1])
    step = (_read_json(checkpoint / TRAINER_STATE, needed=False) or {}).get("global_step")
    if not isinstance(step, int):
        raise UserError(
            f"--run: {checkpoint} does not say which step it is of (there is no global_step in a {TRAINER_STATE}); name the"
            f" folder checkpoint-STEP"
        )
    return step


def _find_evaluation(stated: Path | None, places: Sequence[Path]) -> Path | None:
    if stated is not None:
        if not (stated / SUMMARY_FILE).is_file():
            raise UserError(f"--evaluation: {stated} holds no {SUMMARY_FILE}; finish the evaluation, or leave this out")
        return stated
    folders = [place / "evaluation" for place in places]
    return next((folder for folder in folders if (folder / SUMMARY_FILE).is_file()), None)


def _check_evaluation(summary: dict[str, Any], found: Path, places: Sequence[Path]) -> None:
    """The scores must be those of the weights that are published, or of the adapter that was merged into them."""
    settings = summary.get("settings") or {}
    if "tuned" not in summary.get("scores", {}) or not settings.get("run"):
        raise UserError(
            f"--evaluation: {found} has not scored the tuned model; evaluate the run, or name another folder"
        )
    way_out = _way_out(found)
    scored = next((place for place in places if _same(settings["run"], place)), None)
    origin = Path(settings["run"])
    if scored is None and origin.is_dir():
        raise UserError(f"--evaluation: {found} is of {origin}, another model than the one to publish; {way_out}")
    # Folders that have moved since are told by the evaluation that lies in them, and by their weights.
    scored = scored or next((place for place in places if _same(str(found.parent), place)), places[-1])
    finished = (found / SUMMARY_FILE).stat().st_mtime
    for name, size, time in settings.get("run_weights") or []:
        file = scored / name
        newer = file.is_file() and int(file.stat().st_mtime) != time and file.stat().st_mtime > finished + _COPIED
        if not file.is_file() or file.stat().st_size != size or newer:
            raise UserError(f"--evaluation: {found} is of other weights than {file} holds now; {way_out}")


def _check_evaluated_base(
    settings: dict[str, Any], found: Path, recipe: Recipe, others: Sequence[str | None], revision: str | None
) -> None:
    """The scores, also of the base alone, must be on the base of training; `others` and `revision` name it as well."""
    name, asked = settings["model_name_or_path"], settings["model_revision"]
    trained = recipe.model
    is_base = any(_same_base(name, known) for known in (trained.model_name_or_path, *others))
    # A folder has no revisions.
    if is_base and (not hub_id(name) or asked in (trained.model_revision, revision)):
        return
    raise UserError(
        f"--evaluation: {found} has scored on the base model {name}, revision {asked}, and the run was trained on"
        f" {trained.model_name_or_path}, revision {revision or trained.model_revision}; {_way_out(found)}"
    )


def _same_base(first: str, second: str | None) -> bool:
    if second is None:
        return False
    # A folder that has moved since is told by its name.
    moved = public_name(first) == public_name(second) and not Path(second).exists()
    return first == second or moved or _same(first, Path(second))


def _way_out(found: Path) -> str:
    return f"evaluate again with --overwrite, name another folder with --evaluation, or delete {found}"


def _same(first: str | None, second: Path) -> bool:
    return first is not None and Path(first).resolve() == second.resolve()


def _read_json(path: Path, needed: bool) -> dict[str, Any] | None:
    if not path.is_file() and not needed:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--run: {path} cannot be read ({error}); mend or delete it") from None
    if not isinstance(value, dict):
        raise UserError(f"--run: {path} does not hold what the scripts write there; mend or delete it")
    return value
