"""Names of runs and models on the page, without local folders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qwen_vl_sft import tiny
from qwen_vl_sft.config.settings import ModelSettings
from qwen_vl_sft.evaluation.metrics import headline_of
from qwen_vl_sft.evaluation.scoring import SUMMARY_FILE
from qwen_vl_sft.inference.source import Source, TunedModel

EVALUATION = "evaluation"


def run_names(sources: Sequence[Source]) -> list[str]:
    """Name each run by its folder, with as many parent folders as tell the runs apart."""
    paths = [source.tuned.folder.resolve().parts[1:] for source in sources if source.tuned]
    names = []
    for source, parts in zip(sources, paths, strict=True):
        assert source.tuned
        length = 1 if source.tuned.home == source.tuned.folder else 2
        while length < len(parts) and sum(other[-length:] == parts[-length:] for other in paths) > 1:
            length += 1
        names.append("/".join(parts[-length:]))
    return names


def headline_score(tuned: TunedModel) -> tuple[str, float] | None:
    """Return the headline of the run's own evaluation and its mean, or None."""
    try:
        summary = json.loads((tuned.folder / EVALUATION / SUMMARY_FILE).read_text(encoding="utf-8"))
        cells = summary["scores"]["tuned"]["all"]
        metric = headline_of(cells)
        return metric, float(cells[metric]["mean"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def label(name: str, tuned: TunedModel) -> str:
    """Return a run's label in the page's list."""
    score = headline_score(tuned)
    return name if score is None else f"{name} ({score[0].replace('_', ' ')} {score[1]:.1%})"


def model_name(settings: ModelSettings) -> str:
    """Return the base model's name: its Hub id, its builtin name, or the last part of its folder."""
    path = str(settings.model_name_or_path)
    return tiny.builtin_name(path) or (Path(path).name if Path(path).exists() else path)
