"""Score a model on a split of the data, on any number of processes; a killed evaluation can be resumed.

Each process answers its rows into a file of its own; the first one joins the files in row order and scores them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object

from qwen_vl_sft.checkpointing.run_folder import environment
from qwen_vl_sft.data.media.image_file import ImageFile
from qwen_vl_sft.distributed.context import DistributedContext, read_context
from qwen_vl_sft.distributed.folder_claim import claim_for_all
from qwen_vl_sft.distributed.launch import join, start
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.answer_files import AnswerFiles, Answers, check_output_dir, different_settings
from qwen_vl_sft.evaluation.options import EvaluationPlan
from qwen_vl_sft.evaluation.own_engine import Answerer, OwnEngine
from qwen_vl_sft.evaluation.report import write_report
from qwen_vl_sft.evaluation.scoring import (
    REPORT_FILE,
    ROWS_FILE,
    SUMMARY_FILE,
    Question,
    score_row,
    summarise,
    write_results,
)
from qwen_vl_sft.evaluation.task import Task, describe_task, prepare
from qwen_vl_sft.inference.source import ARMS, precision_summary


def evaluate(plan: EvaluationPlan, report: bool = False, answering: Answerer | None = None) -> dict[str, Any] | None:
    """Answer and score; returns the summary on the first process, None on the others. Raises `UserError`.

    Until everything has been checked nothing is written. With `report`, the page of the rows is written too. `answering`
    answers in place of this package's engine.
    """
    answering = answering or OwnEngine()
    began = time.monotonic()
    context = read_context(bool(plan.recipe.get("use_cpu")))
    task = prepare(plan)
    settings = describe_task(plan, task)
    barrier = join_processes(context)
    check = partial(check_output_dir, plan.output_dir, in_use_allowed=plan.options.resume or plan.options.overwrite)
    with claim_for_all(plan.output_dir, "--output_dir", context, check):
        files = AnswerFiles(plan.output_dir)
        arms, speeds = _answer(plan, task, settings, files, context, barrier, answering)
        if context.rank > 0:
            return None
        answers = files.read()
        rows = collect(task.questions, answers, arms)
        images = {question.row_id: shown for question, shown in zip(task.questions, task.images, strict=True)}
        summary = summarise(rows, arms, images) | {
            "dataset": task.rows.name,
            "skipped_rows": task.left_out + len(task.questions) - len(rows),
            "cut_answers": count_truncated(rows, answers, arms),
            "settings": settings,
            "precision": precision_summary(plan),
            "speed": speed_of_arms(speeds),
            **answering.about(plan, task, answers),
            "seconds": round(time.monotonic() - began, 1),
            "environment": environment(
                {"processes": context.processes, "strategy": context.strategy}, {}, [_device(context)]
            ),
        }
        write_results(plan.output_dir, rows, summary)
        if report:
            # Last: a page that fails costs no answers.
            write_report(plan.output_dir, rows, summary, charts_of(task))
    return summary


def _answer(
    plan: EvaluationPlan,
    task: Task,
    settings: Mapping[str, Any],
    files: AnswerFiles,
    context: DistributedContext,
    barrier: Callable[[], None],
    answering: Answerer,
) -> tuple[list[str], list[dict[str, tuple[int, float]]]]:
    """Answer what is not answered yet; return the arms, and the speed of every process (`Answerer.answer_all`)."""
    arms = _arms_with_previous(plan, task.arms, files, settings)
    barrier()  # nobody writes before everybody has read
    if context.rank == 0:
        if plan.options.overwrite:
            files.clear(SUMMARY_FILE, ROWS_FILE, REPORT_FILE)
        files.write_settings({**settings, "arms": arms})
    barrier()
    answered = files.read()
    barrier()  # or the shares would overlap
    files.repair(context.rank)
    own_speed = answering.answer_all(plan, task, arms, answered, files, context)
    barrier()
    return arms, gather_object([own_speed]) if context.processes > 1 else [own_speed]


def charts_of(task: Task) -> Callable[[int], list[ImageFile]]:
    """Return a function from a `row_id` to the row's images, not decoded yet."""
    index_of = {question.row_id: index for index, question in enumerate(task.questions)}
    return lambda row_id: task.conversation(index_of[row_id]).media


def join_processes(context: DistributedContext) -> Any:
    """Start the process group of a launched run; returns a function in which all processes wait for each other."""
    start(context)
    # Every process holds a whole model here; transformers would load an empty one where FSDP is on.
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    state = join(context)
    assert state.num_processes == context.processes, (
        f"{state.num_processes} processes take part, not {context.processes}"
    )
    return state.wait_for_everyone


def speed_of_arms(speeds: Sequence[Mapping[str, tuple[int, float]]]) -> dict[str, dict[str, float]]:
    """Return rows of all processes, seconds of the slowest and rows a second, for each arm answered in this run."""
    found = {}
    for arm in dict.fromkeys(arm for speed in speeds for arm in speed):
        rows = sum(speed[arm][0] for speed in speeds if arm in speed)
        seconds = max(speed[arm][1] for speed in speeds if arm in speed)
        found[arm] = {"rows": rows, "seconds": round(seconds, 3), "rows_per_second": round(rows / seconds, 3)}
    return found


def collect(questions: Sequence[Question], answers: Answers, arms: Sequence[str]) -> list[dict[str, Any]]:
    """Score the rows that every arm answered, in row order."""
    for arm in arms:
        missing = [question.row_id for question in questions if question.row_id not in answers.get(arm, {})]
        assert not missing, f"{arm}: no answer to rows {missing[:5]}"
    rows = []
    for question in sorted(questions, key=lambda question: question.row_id):
        texts = {arm: answer.text for arm in arms if (answer := answers[arm][question.row_id]) is not None}
        if len(texts) == len(arms):
            rows.append(score_row(question, texts))
    if not rows:
        raise UserError(f"none of the {len(questions)} rows can be read; fix them, and evaluate again with --overwrite")
    return rows


def count_truncated(rows: Sequence[Mapping[str, Any]], answers: Answers, arms: Sequence[str]) -> dict[str, int]:
    """Count the truncated answers per arm: those cut at `max_new_tokens`."""
    scored = {arm: [answers[arm][row["row_id"]] for row in rows] for arm in arms}
    return {arm: sum(answer is not None and not answer.ended for answer in given) for arm, given in scored.items()}


def _arms_with_previous(
    plan: EvaluationPlan, arms: Sequence[str], files: AnswerFiles, settings: Mapping[str, Any]
) -> list[str]:
    """Return the arms to score, with those of the resumed evaluation. Raises `UserError` if its settings differ."""
    previous = files.read_settings() if plan.options.resume else {}
    previous_arms = previous.pop("arms", [])
    if not previous:
        return list(arms)
    different = different_settings(previous, settings)
    if different:
        raise UserError(
            f"--resume: {plan.output_dir} was begun with other settings ({'; '.join(different)});"
            f" give the same ones, start over with --overwrite, or name another --output_dir"
        )
    return [arm for arm in ARMS if arm in {*previous_arms, *arms}]


def _device(context: DistributedContext) -> str:
    return "cpu" if context.on_cpu else torch.cuda.get_device_name(context.local_rank)
