"""An export compared with its original: both answer the same rows, and the loss of accuracy decides."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_vl_sft.distributed.context import read_context
from qwen_vl_sft.errors import BadRow, UserError
from qwen_vl_sft.evaluation.clusters import compare_clustered, number_clusters
from qwen_vl_sft.evaluation.metrics import Comparison
from qwen_vl_sft.evaluation.scoring import score_row, summarise
from qwen_vl_sft.evaluation.task import WAY_OUT, Prompts, Task
from qwen_vl_sft.exporting.options import SCHEMES, ExportPlan
from qwen_vl_sft.inference.generation import decode_answer
from qwen_vl_sft.inference.models import load_arm, make_encoder
from qwen_vl_sft.serving.base import EngineAnswer, Served
from qwen_vl_sft.serving.check import Asked, ask
from qwen_vl_sft.serving.engines.llama_cpp import image_tokens
from qwen_vl_sft.serving.exported import ADAPTER_GGUF
from qwen_vl_sft.serving.own_answers import own_answers
from qwen_vl_sft.serving.process import EngineFailed, EngineProcess, EngineRefused, answer_all

ORIGINAL, EXPORT = "original", "export"
# Metrics by which an export is judged, the first that the rows have.
METRICS = ("relaxed_accuracy", "mean_iou")


@dataclass(frozen=True)
class Judged:
    """What the rows say of an export: the loss in points, whether it is more than luck, and what is wrong."""

    metric: str
    comparison: Comparison
    problems: list[str]


def served_by(plan: ExportPlan, folder: Path, processor: Any) -> Served:
    """Return the export as the engine serves it."""
    size = processor.image_processor.size
    limits = {name: int(size[name]) for name in ("shortest_edge", "longest_edge") if size.get(name)}
    adapter = folder / ADAPTER_GGUF if plan.adapter else None
    return Served(folder, plan.evaluation.recipe.model.dtype, adapter, limits=limits if plan.engine.gguf else {})


def compare(plan: ExportPlan, task: Task, python: Path, folder: Path) -> tuple[dict[str, Any], Judged]:
    """Answer the rows with the original and with the export. Raises `UserError` where the export cannot be asked."""
    encoder = make_encoder(plan.evaluation, "tuned", task.processor, task.system_message)
    prompts = Prompts(task.rows, encoder)
    served = served_by(plan, folder, task.processor)
    asked, theirs, versions = _ask_export(plan, task, prompts, served, python)
    rows = _scored_rows(plan, task, prompts, theirs)
    judged = judge(plan, task, rows, asked, theirs)
    images = {question.row_id: shown for question, shown in zip(task.questions, task.images, strict=True)}
    summary = summarise(rows, [ORIGINAL, EXPORT], images)
    report = {
        "to": plan.options.to,
        "model": str(plan.options.run.resolve()),
        "adapter": plan.adapter is not None,
        "precision": plan.options.gguf_type if plan.options.to == "gguf" else SCHEMES[plan.options.to],
        "original_precision": plan.evaluation.recipe.model.precision,
        "versions": versions,
        "arguments": plan.engine.arguments(served),
        "image_tokens": image_tokens(plan.config, served.limits) if served.limits else None,
        "dataset": task.rows.name,
        "rows": len(rows),
        "same_answers": sum(row["arms"][ORIGINAL]["answer"] == row["arms"][EXPORT]["answer"] for row in rows),
        "same_prompt_lengths": sum(len(asked.prompt_ids[n]) == theirs[n].prompt_tokens for n in theirs),
        "bytes": {"original": size_of(plan.options.run), "export": size_of(folder)},
        "metric": judged.metric,
        "scores": summary["scores"],
        "comparison": asdict(judged.comparison),
        "max_loss": plan.options.max_loss,
        "problems": judged.problems,
        "differing": [row for row in rows if row["arms"][ORIGINAL]["answer"] != row["arms"][EXPORT]["answer"]][:20],
    }
    return report, judged


def _ask_export(
    plan: ExportPlan, task: Task, prompts: Prompts, served: Served, python: Path
) -> tuple[Asked, dict[int, EngineAnswer], dict[str, str]]:
    """Return what the engine was asked, its answers by row, and its versions. Raises `UserError`."""
    encoder, most = prompts.encoder, plan.evaluation.recipe.run.max_new_tokens
    with tempfile.TemporaryDirectory() as place:
        try:
            asked = ask(task, prompts, encoder, Path(place), most)
        except BadRow as error:
            raise UserError(f"{error}; {WAY_OUT}") from None
        arguments = [*plan.engine.arguments(served), *plan.engine.check_arguments(served, asked.size)]
        try:
            with EngineProcess(plan.engine, python, served, arguments, Path(place) / "engine.log") as engine:
                has_adapter = plan.adapter is not None
                theirs = answer_all(engine, asked.prompts, has_adapter, most, encoder.template_options, EXPORT)
                return asked, theirs, engine.versions
        except (EngineRefused, EngineFailed) as error:
            raise UserError(f"--to {plan.options.to}: {plan.engine.title} does not serve the export: {error}") from None


def _scored_rows(
    plan: ExportPlan, task: Task, prompts: Prompts, theirs: Mapping[int, EngineAnswer]
) -> list[dict[str, Any]]:
    """Answer the rows with the original too, and score both."""
    encoder, most = prompts.encoder, plan.evaluation.recipe.run.max_new_tokens
    model = load_arm(plan.evaluation, "tuned", None, read_context(bool(plan.evaluation.recipe.get("use_cpu"))))
    ours = own_answers(model, encoder, prompts.encode, task.units, most, ORIGINAL)
    rows = []
    for number, question in enumerate(task.questions):
        texts = {ORIGINAL: decode_answer(encoder, ours[number]), EXPORT: theirs[number].text}
        read = {arm: prompts.in_data_coordinates(number, text) for arm, text in texts.items()}
        rows.append(score_row(question, read))
    return rows


def judge(
    plan: ExportPlan, task: Task, rows: list[dict[str, Any]], asked: Asked, theirs: Mapping[int, EngineAnswer]
) -> Judged:
    """Judge an export by prompts of the same length and by the accuracy of the same rows, images counting as one draw."""
    metric = next(name for name in METRICS if any(name in row["arms"][ORIGINAL] for row in rows))
    having = [number for number, row in enumerate(rows) if metric in row["arms"][ORIGINAL]]
    scores = [[float(rows[number]["arms"][arm][metric]) for number in having] for arm in (ORIGINAL, EXPORT)]
    images = number_clusters([task.images[number] for number in having])
    comparison = compare_clustered(scores[0], scores[1], images)
    problems = []
    other = [number for number, answer in theirs.items() if answer.prompt_tokens != len(asked.prompt_ids[number])]
    if other:
        ids, answer = asked.prompt_ids[other[0]], theirs[other[0]]
        problems.append(
            f"{len(other)} of {len(rows)} prompts have other tokens, the first {answer.prompt_tokens} for {len(ids)}"
        )
    loss = -100 * comparison.difference.mean
    if loss > plan.options.max_loss and comparison.p_value < 0.05:
        problems.append(
            f"{metric} is {loss:.1f} points lower (p = {comparison.p_value:.3g}), more than --max_loss"
            f" {plan.options.max_loss:g}"
        )
    return Judged(metric, comparison, problems)


def size_of(folder: Path) -> int:
    """Return the bytes of the weight files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
