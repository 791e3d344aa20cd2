"""Answer the rows of an evaluation with the engine of this package. Other engines answer them by the same protocol."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from tqdm import tqdm

from qwen_vl_sft.distributed.context import DistributedContext
from qwen_vl_sft.errors import BadRow, UserError, first_line
from qwen_vl_sft.evaluation.answer_files import AnswerFiles, Answers, deal
from qwen_vl_sft.evaluation.options import EvaluationPlan
from qwen_vl_sft.evaluation.task import WAY_OUT, Prompts, Task
from qwen_vl_sft.inference.engine.cache import free_memory
from qwen_vl_sft.inference.engine.engine import Engine
from qwen_vl_sft.inference.engine.features import FeatureMemory
from qwen_vl_sft.inference.generation import GeneratedAnswer
from qwen_vl_sft.inference.models import changes_tower, load_arm, make_encoder
from qwen_vl_sft.modeling.kept_features import unrounded_features

# Share of the machine's free memory that features of images may take, and of the GPU's.
FEATURE_SHARE, FEATURE_SHARE_OF_GPU = 0.25, 0.15


class Answerer(Protocol):
    """Who answers the rows of an evaluation."""

    def answer_all(
        self,
        plan: EvaluationPlan,
        task: Task,
        arms: Sequence[str],
        answered: Answers,
        files: AnswerFiles,
        context: DistributedContext,
    ) -> dict[str, tuple[int, float]]:
        """Answer this process's share of every arm, but for what is answered.

        Returns the rows that were answered for each arm, and the seconds that took, without loading.
        """

    def about(self, plan: EvaluationPlan, task: Task, answers: Answers) -> dict[str, Any]:
        """Return what the summary is told of it beside the scores, once all rows are answered."""


class OwnEngine:
    """The engine of this package."""

    def answer_all(
        self,
        plan: EvaluationPlan,
        task: Task,
        arms: Sequence[str],
        answered: Answers,
        files: AnswerFiles,
        context: DistributedContext,
    ) -> dict[str, tuple[int, float]]:
        """Answer this process's share of every arm. A model is loaded only where something is left to answer.

        Returns the rows that this process answered for each arm, and the seconds that took, without loading.
        """
        model, speed = None, {}
        seen: FeatureMemory | None = None
        index_of = {question.row_id: index for index, question in enumerate(task.questions)}
        shares = {}
        for arm in arms:
            done = {index_of[row_id] for row_id in answered.get(arm, {})}
            if share := deal(task.units, done, context.rank, context.processes):
                shares[arm] = share
        for arm, share in shares.items():
            if arm == "tuned" and plan.tuned and not plan.tuned.is_adapter:
                # A whole model of its own: with the base still there, the GPU would have to hold both.
                model = seen = None
                gc.collect()
                torch.cuda.empty_cache()
            model = _load(plan, arm, model, context)
            if seen is None or changes_tower(model):
                of_base = not changes_tower(model) and (arm != "tuned" or plan.tuned is None or plan.tuned.is_adapter)
                # Once more arms follow on the same tower, its features are kept for them.
                seen = _feature_memory(plan, task, model, context, of_base, more_follow=arm != list(shares)[-1])
            encoder = make_encoder(plan, arm, task.processor, task.system_message)
            prompts = Prompts(task.rows, encoder, plan.recipe.data.bad_rows == "skip")
            title = arm if context.processes == 1 else f"{arm}, process 0 of {context.processes}"
            began, rows = time.perf_counter(), sum(map(len, share))
            with tqdm(total=rows, desc=title, unit="row", disable=context.rank > 0) as progress:
                for finished in _answers(plan, model, prompts, share, seen):
                    files.append(context.rank, arm, _by_row_id(task, prompts, finished))
                    progress.update(len(finished))
            speed[arm] = rows, time.perf_counter() - began
        return speed

    def about(self, plan: EvaluationPlan, task: Task, answers: Answers) -> dict[str, Any]:
        """Return nothing more."""
        return {}


def _by_row_id(
    task: Task, prompts: Prompts, finished: Sequence[tuple[int, GeneratedAnswer]]
) -> dict[int, GeneratedAnswer | None]:
    """Return answers as their files hold them: by `row_id`, in the data's coordinates, None where a row is unreadable."""
    found: dict[int, GeneratedAnswer | None] = {}
    for index, answer in finished:
        readable = index not in prompts.unreadable
        read = replace(answer, text=prompts.in_data_coordinates(index, answer.text)) if readable else None
        found[task.questions[index].row_id] = read
    return found


def _load(plan: EvaluationPlan, arm: str, model: Any, context: DistributedContext) -> Any:
    try:
        return load_arm(plan, arm, model, context)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--arms: the GPU's memory does not hold the model of {arm}; load it with --load_in_4bit and --overwrite, or"
            f" end what else runs on the GPU ({first_line(error)})"
        ) from error


def _feature_memory(
    plan: EvaluationPlan, task: Task, model: Any, context: DistributedContext, of_base: bool, more_follow: bool
) -> FeatureMemory:
    """Make room for features of images: on the model's GPU, and in this process's part of the machine's memory.

    Those of the base model's tower that training keeps on disk are read from there.
    """
    kept = unrounded_features(plan.recipe, task.processor) if of_base else None
    if not more_follow:
        return FeatureMemory(0, kept)
    on_gpu = 0 if context.on_cpu else int(free_memory(model.device) * FEATURE_SHARE_OF_GPU)
    on_host = int(free_memory(torch.device("cpu")) * FEATURE_SHARE) // context.processes
    return FeatureMemory(on_host, kept, most_bytes_on_gpu=on_gpu)


def _answers(
    plan: EvaluationPlan, model: Any, prompts: Prompts, share: Sequence[Sequence[int]], memory: FeatureMemory
) -> Iterator[list[tuple[int, GeneratedAnswer]]]:
    options = plan.options
    try:
        engine = Engine(
            model,
            prompts.encoder,
            plan.recipe.run.max_new_tokens,
            rows=options.batch_size,
            memory=memory,
            cuda_graphs=options.cuda_graphs,
            decode_kernel=options.decode_kernel,
        )
        yield from engine.answers(prompts.encode, share)
    except BadRow as error:
        raise UserError(f"{error}; {WAY_OUT}") from None
    except torch.OutOfMemoryError as error:
        raise UserError(
            "--batch_size: the GPU's memory does not hold the rows that are answered at once; give a number, or a smaller"
            f" one, with --overwrite, or reduce the images with --max_pixels ({first_line(error)})"
        ) from error
