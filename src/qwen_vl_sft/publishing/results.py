"""Evaluation results of a published model: find them, check that they are of this model, compare the settings.

The model card takes its results from the summary.json that is found here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_vl_sft.config.reading import Recipe
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.scoring import SUMMARY_FILE
from qwen_vl_sft.publishing.names import hub_id, public_name

# Seconds that weights may be newer than their evaluation: a copied folder has the times of the copy.
COPY_TOLERANCE = 60


def find_evaluation(stated: Path | None, folders: Sequence[Path]) -> Path | None:
    """Return the evaluation folder that is stated, else the first `evaluation` in `folders`. Raises `UserError`."""
    if stated is not None:
        if not (stated / SUMMARY_FILE).is_file():
            raise UserError(f"--evaluation: {stated} holds no {SUMMARY_FILE}; finish the evaluation, or leave this out")
        return stated
    evaluations = [folder / "evaluation" for folder in folders]
    return next((folder for folder in evaluations if (folder / SUMMARY_FILE).is_file()), None)


def check_evaluation(summary: Mapping[str, Any], found: Path, models: Sequence[Path]) -> None:
    """Raise `UserError` unless the scores are of the weights in one of the folders `models`."""
    settings = summary.get("settings") or {}
    if "tuned" not in summary.get("scores", {}) or not settings.get("run"):
        raise UserError(
            f"--evaluation: {found} has not scored the tuned model; evaluate the run, or name another folder"
        )
    way_out = _way_out(found)
    scored = next((folder for folder in models if same_folder(settings["run"], folder)), None)
    origin = Path(settings["run"])
    if scored is None and origin.is_dir():
        raise UserError(f"--evaluation: {found} is of {origin}, another model than the one to publish; {way_out}")
    # A folder that has moved since is recognised by the evaluation in it, and by its weights.
    scored = scored or next((folder for folder in models if same_folder(str(found.parent), folder)), models[-1])
    finished = (found / SUMMARY_FILE).stat().st_mtime
    for name, size, time in settings.get("run_weights") or []:
        file = scored / name
        newer = (
            file.is_file() and int(file.stat().st_mtime) != time and file.stat().st_mtime > finished + COPY_TOLERANCE
        )
        if not file.is_file() or file.stat().st_size != size or newer:
            raise UserError(f"--evaluation: {found} is of other weights than {file} holds now; {way_out}")


def check_evaluated_base(
    settings: Mapping[str, Any], found: Path, recipe: Recipe, others: Sequence[str | None], revision: str | None
) -> None:
    """Raise `UserError` unless the evaluation used the base model of training, also known as `others` at `revision`."""
    name, used = settings["model_name_or_path"], settings["model_revision"]
    trained = recipe.model
    is_base = any(_same_base(name, known) for known in (trained.model_name_or_path, *others))
    # A folder has no revisions.
    if is_base and (not hub_id(name) or used in (trained.model_revision, revision)):
        return
    raise UserError(
        f"--evaluation: {found} has scored on the base model {name}, revision {used}, and the run was trained on"
        f" {trained.model_name_or_path}, revision {revision or trained.model_revision}; {_way_out(found)}"
    )


def other_prompt(summary: Mapping[str, Any], system_message: str) -> bool:
    """Return whether the evaluation used another system message than the published one."""
    return summary["settings"]["system_message"].strip() != system_message


def settings_differences(
    summary: Mapping[str, Any], system_message: str, pixel_limits: Mapping[str, int], enable_thinking: bool = False
) -> list[str]:
    """Compare evaluation settings with published settings; return a phrase for each difference."""
    settings, found = summary["settings"], []
    if other_prompt(summary, system_message):
        message = settings["system_message"].strip()
        used = f"the system message {json.dumps(message, ensure_ascii=False)}" if message else "no system message"
        found.append(f"{used} instead of the one below" if system_message else used)
    thought = bool(settings.get("enable_thinking"))
    if thought != enable_thinking:
        found.append(f"`enable_thinking` {str(thought).lower()} instead of {str(enable_thinking).lower()}")
    for name, limit in pixel_limits.items():
        if settings[name] != limit:
            found.append(f"`{name}` {settings[name]:,} instead of {limit:,}")
    return found


def same_folder(first: str | None, second: Path) -> bool:
    """Return whether two paths name one folder."""
    return first is not None and Path(first).resolve() == second.resolve()


def _same_base(first: str, second: str | None) -> bool:
    if second is None:
        return False
    # A folder that has moved since is recognised by its name.
    moved = public_name(first) == public_name(second) and not Path(second).exists()
    return first == second or moved or same_folder(first, Path(second))


def _way_out(found: Path) -> str:
    return f"evaluate again with --overwrite, name another folder with --evaluation, or delete {found}"
