"""`report.html`: the scores of an evaluation and every row with its chart, which needs no network and no server."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from qwen_vl_sft.atomic_write import atomic_write, writing_to
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.evaluation.error_kinds import KINDS, error_kind
from qwen_vl_sft.evaluation.metrics import NOTES, headline, headline_of, measured_metrics
from qwen_vl_sft.evaluation.report_images import IMAGES_FOLDER, ImageWriter, Shown, embed_file, write_beside
from qwen_vl_sft.evaluation.scoring import ALL, REPORT_FILE, SPLIT_COLUMN, describe_cut, describe_engine
from qwen_vl_sft.html_page import asset, facts_list, fill, table, to_script_json

# The charts of a row, by its row_id.
Charts = Callable[[int], Sequence[ImageFile]]

# The arm whose wins and losses the page offers.
TUNED = "tuned"
# With more rows than this, charts lie in files beside the page: at 25,000 rows they would be 240 MB inside it.
EMBEDDED_ROWS = 1000
COMPARISON_HEADINGS = ("arms", "rows", "difference", "won : lost", "p")
PAGE, STYLE, SCRIPT = "report_page.html", "report_page.css", "report_page.js"


def write_report(
    folder: Path, rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], charts: Charts | None = None
) -> None:
    """Write `report.html` of scored rows (lines of `rows.jsonl`) and their summary; without `charts`, texts alone.

    The charts of more than `EMBEDDED_ROWS` rows are written into a folder beside the page.
    """
    beside = folder / IMAGES_FOLDER
    with writing_to(folder):
        if beside.is_dir():
            shutil.rmtree(beside)
        if charts and len(rows) > EMBEDDED_ROWS:
            beside.mkdir(parents=True)
            page = render(rows, summary, charts, partial(write_beside, beside))
        else:
            page = render(rows, summary, charts)
        atomic_write(folder / REPORT_FILE, page)


def render(
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    charts: Charts | None = None,
    write_image: Callable[[ImageFile], Shown] = embed_file,
) -> str:
    """Return the page as HTML. Texts of rows reach it only escaped, or as JSON that the script shows as text."""
    data = page_data(rows, list(summary["scores"]), charts, write_image)
    headline = headline_of(next(iter(summary["scores"].values()))[ALL])
    parts = {
        "title": escape(_title(summary)),
        "style": asset("qwen_vl_sft.evaluation", STYLE),
        "facts": _facts(summary),
        "scores": _scores(summary["scores"]),
        "comparisons": _comparisons(summary["comparisons"], headline),
        "clustered": _clustered(summary.get("by_image"), headline),
        "errors": _errors(data),
        "data": to_script_json(data),
        "script": asset("qwen_vl_sft.evaluation", SCRIPT),
    }
    return fill(asset("qwen_vl_sft.evaluation", PAGE), parts)


def page_data(
    rows: Sequence[Mapping[str, Any]],
    arms: Sequence[str],
    charts: Charts | None,
    write_image: Callable[[ImageFile], Shown] = embed_file,
) -> dict[str, Any]:
    """Return what the page's script shows: `arms`, `kinds`, `rows`, and `images`, in which rows share an equal chart.

    A row's `arms` are `[answer, right, kind]` in the order of `arms`; `kind` is None when the answer is right.
    """
    shown = []
    with ImageWriter(write_image) as images:
        for row in rows:
            shown.append(
                {
                    "id": row["row_id"],
                    "question": row["question"],
                    "gold": row["answers"],
                    "split": row[SPLIT_COLUMN],
                    "charts": [images.number(chart) for chart in (charts(row["row_id"]) if charts else ())],
                    "arms": [_judged(row["arms"][arm], row["answers"]) for arm in arms],
                }
            )
        written = images.shown()
    splits = sorted({row["split"] for row in shown if row["split"] is not None})
    return {"arms": arms, "tuned": TUNED, "splits": splits, "kinds": KINDS, "images": written, "rows": shown}


def _judged(scored: Mapping[str, Any], golds: Sequence[str]) -> list[Any]:
    right = scored[headline(scored)] == 1
    return [scored["answer"], right, None if right else error_kind(scored["answer"], golds)]


def _title(summary: Mapping[str, Any]) -> str:
    settings = summary.get("settings", {})
    return str(settings.get("run") or settings.get("model_name_or_path") or summary.get("predictions") or "predictions")


def _facts(summary: Mapping[str, Any]) -> str:
    """Return what was evaluated, from the summary: predictions of another program have no model or dataset."""
    settings, precision = summary.get("settings", {}), summary.get("precision", {})
    scored = precision.get("scored")
    if scored and not precision["scored_as_trained"]:
        scored = f"{scored}; trained in: {precision['trained']}"
    known = summary.get("environment", {}).get("versions", {})
    left_out = summary.get("skipped_rows", 0)
    facts = {
        "Dataset": summary.get("dataset"),
        "Run": settings.get("run"),
        "Model": settings.get("model_name_or_path"),
        "Predictions": summary.get("predictions"),
        "Precision": scored,
        "Engine": describe_engine(summary),
        "Rows": f"{summary['rows']:,}",
        "Left out": f"{left_out:,}, which could not be read" if left_out else None,
        "Cut answers": describe_cut(summary),
        "Versions": ", ".join(f"{name} {version}" for name, version in known.items() if version),
    }
    return facts_list(facts)


def _scores(scores: Mapping[str, Any]) -> str:
    measured = measured_metrics(next(iter(scores.values()))[ALL])
    first, *others = [_metric(scores, metric) for metric in measured]
    return f"{first}<details><summary>The other metrics</summary>{''.join(others)}</details>"


def _metric(scores: Mapping[str, Any], metric: str) -> str:
    splits = {split: cells for split, cells in next(iter(scores.values())).items() if metric in cells}
    headings = [f"{escape(split)} <small>({cells[metric]['rows']:,})</small>" for split, cells in splits.items()]
    body = [[escape(arm), *(_bar(of_arm[split][metric]) for split in splits)] for arm, of_arm in scores.items()]
    name = metric.replace("_", " ")
    return f"<h3>{name[0].upper()}{name[1:]}</h3><p>{NOTES[metric]}</p>" + table(name, ["arm", *headings], body)


def _bar(cell: Mapping[str, float]) -> str:
    """Return the percentage with its interval, in figures and drawn on a line from 0 to 100."""
    mean, low, high = (100 * cell[name] for name in ("mean", "low", "high"))
    drawn = f'<i class="bar" style="--low:{low:.1f}%;--mean:{mean:.1f}%;--width:{high - low:.1f}%"></i>'
    return f"<b>{mean:.1f}</b> <small>[{low:.1f}, {high:.1f}]</small>{drawn}"


def _clustered(by_image: Mapping[str, Any] | None, headline: str) -> str:
    """Return scores and comparisons of the headline metric where rows on the same images count as one draw."""
    if by_image is None:
        return ""
    note = f"<p>Rows that share images count as one draw: {by_image['clusters']:,} clusters.</p>"
    compared = _comparison_rows(by_image["comparisons"], headline)
    compared_table = table("comparisons clustered by image", COMPARISON_HEADINGS, compared) if compared else ""
    return f"<h2>Clustered by image</h2>{note}{_metric(by_image['scores'], headline)}{compared_table}"


def _comparisons(entries: Iterable[Mapping[str, Any]], metric: str) -> str:
    body = _comparison_rows(entries, metric)
    if not body:
        return ""
    name = metric.replace("_", " ").capitalize()
    note = f"{name} on the same rows, in points; rows won and lost by the first arm; p of an exact sign test."
    return f"<h2>Arms against each other</h2><p>{note}</p>" + table("paired comparisons", COMPARISON_HEADINGS, body)


def _comparison_rows(entries: Iterable[Mapping[str, Any]], metric: str) -> list[list[str]]:
    body = []
    for entry in entries:
        if entry["metric"] != metric:
            continue
        mean, low, high = (100 * entry["difference"][name] for name in ("mean", "low", "high"))
        body.append(
            [
                f"{escape(entry['second'])} − {escape(entry['first'])}",  # noqa: RUF001
                f"{escape(entry['split'])} <small>({entry['rows']:,})</small>",
                f"<b>{mean:+.1f}</b> <small>[{low:+.1f}, {high:+.1f}]</small>",
                f"{entry['second_wins']:,} : {entry['first_wins']:,}",
                f"{entry['p_value']:.2g}",
            ]
        )
    return body


def _errors(data: Mapping[str, Any]) -> str:
    """Return how many wrong answers of each kind every arm gave."""
    body = []
    for index, arm in enumerate(data["arms"]):
        counts = Counter(row["arms"][index][2] for row in data["rows"])
        body.append([escape(arm), *(f"{counts[kind]:,}" for kind in KINDS)])
    return "<h2>Wrong answers by kind</h2>" + table("wrong answers by kind", ["arm", *KINDS.values()], body)
