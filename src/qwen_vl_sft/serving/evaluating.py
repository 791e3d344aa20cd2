"""Evaluations whose rows another engine answers; this package's engine answers a sample of them too."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.dataset import even_indices
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.distributed.context import DistributedContext, read_context
from qwen_vl_sft.errors import BadRow, UserError, shortened
from qwen_vl_sft.evaluation.answer_files import AnswerFiles, Answers
from qwen_vl_sft.evaluation.options import EvaluationPlan
from qwen_vl_sft.evaluation.task import WAY_OUT, Prompts, Task
from qwen_vl_sft.inference.engine.engine import Engine
from qwen_vl_sft.inference.generation import GeneratedAnswer, answer_ends, decode_answer, plan_units
from qwen_vl_sft.inference.models import load_arm, make_encoder
from qwen_vl_sft.inference.source import ADAPTER_FILE, tuned_settings
from qwen_vl_sft.merging.base import download
from qwen_vl_sft.merging.plan import read_adapter_config
from qwen_vl_sft.serving.base import EngineAnswer, EnginePrompt, Served, Size
from qwen_vl_sft.serving.check import changes_vision, engine_prompt
from qwen_vl_sft.serving.comparison import TUNED
from qwen_vl_sft.serving.environments import python_of
from qwen_vl_sft.serving.process import EngineFailed, EngineProcess, EngineRefused
from qwen_vl_sft.serving.registry import engine_named

# Rows that an engine is asked at once: what it answered before is kept if it is killed.
ROWS_AT_ONCE = 64
# Rows of each arm that this package's engine answers too, and differing answers that the summary keeps.
SAMPLE, MOST_KEPT = 32, 20
LOG = "{engine}.log"


class EngineAnswerer:
    """Answers all arms with an engine in its own environment, one process; `Answerer` of an evaluation.

    Raises `UserError` where the engine is not known, or not installed, and where several processes are started.
    """

    def __init__(self, name: str) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(f"--engine {name} is a process of its own; start evaluate.py without a launcher")
        self.engine = engine_named(name)
        self.python = python_of(self.engine)
        self._versions: dict[str, str] = {}

    def answer_all(
        self,
        plan: EvaluationPlan,
        task: Task,
        arms: Sequence[str],
        answered: Answers,
        files: AnswerFiles,
        context: DistributedContext,
    ) -> dict[str, tuple[int, float]]:
        """Answer what is not answered of every arm, with one process for each model. Raises `UserError`."""
        left = {}
        for arm in arms:
            done = answered.get(arm, {})
            if rows := [index for index, asked in enumerate(task.questions) if asked.row_id not in done]:
                left[arm] = rows
        speed: dict[str, tuple[int, float]] = {}
        for group in _by_model(plan, left):
            try:
                speed |= self._serve(plan, task, {arm: left[arm] for arm in group}, files)
            except (EngineRefused, EngineFailed) as error:
                merge = ", or evaluate the merged model (scripts/merge.py)" if _has_adapter(plan, group) else ""
                raise UserError(
                    f"--engine: {self.engine.title} does not answer: {error}; leave --engine out{merge}"
                ) from None
        return speed

    def about(self, plan: EvaluationPlan, task: Task, answers: Answers) -> dict[str, Any]:
        """Have this package's engine answer a sample of the rows, and return how many answers agree, arm by arm."""
        arms = {}
        for arm, ours in _own_answers(plan, task, list(answers)):
            pairs = {
                index: (ours[index].text, theirs.text)
                for index in ours
                if (theirs := answers[arm][task.questions[index].row_id]) is not None
            }
            others = [
                {"row_id": task.questions[index].row_id, "ours": shortened(one), "engines": shortened(other)}
                for index, (one, other) in pairs.items()
                if one != other
            ]
            arms[arm] = {"rows": len(pairs), "same": len(pairs) - len(others), "others": others[:MOST_KEPT]}
        return {
            "engine": {
                "name": self.engine.name,
                "title": self.engine.title,
                "versions": self._versions,
                "compared": arms,
            }
        }

    def _serve(
        self, plan: EvaluationPlan, task: Task, left: Mapping[str, Sequence[int]], files: AnswerFiles
    ) -> dict[str, tuple[int, float]]:
        """Answer arms that share a model. Raises `EngineRefused` or `EngineFailed`."""
        engine, most = self.engine, plan.recipe.run.max_new_tokens
        encoders = {arm: make_encoder(plan, arm, task.processor, task.system_message) for arm in left}
        served = _served(plan, list(left), task.processor)
        if (reason := engine.refuses(served)) is not None:
            raise EngineRefused(reason)
        size = _size(task, encoders.values(), {index for rows in left.values() for index in rows}, most)
        arguments = [*engine.arguments(served), *engine.check_arguments(served, size)]
        log = plan.output_dir / LOG.format(engine=engine.name)
        speed = {}
        tqdm.write(f"starting {engine.title} ({log})")
        with EngineProcess(engine, self.python, served, arguments, log) as process:
            self._versions = process.versions
            for arm, rows in left.items():
                began = time.perf_counter()
                prompts = Prompts(task.rows, encoders[arm], plan.recipe.data.bad_rows == "skip")
                with tqdm(total=len(rows), desc=f"{engine.title}, {arm}", unit="row") as progress:
                    for start in range(0, len(rows), ROWS_AT_ONCE):
                        asked = rows[start : start + ROWS_AT_ONCE]
                        found = _ask(process, task, prompts, asked, arm == TUNED and served.adapter is not None, most)
                        new = {task.questions[index].row_id: found.get(index) for index in asked}
                        files.append(0, arm, new)
                        progress.update(len(asked))
                speed[arm] = len(rows), time.perf_counter() - began
        return speed


def _by_model(plan: EvaluationPlan, arms: Mapping[str, Any]) -> list[list[str]]:
    """Group arms by the model that is served: an adapter's base serves them all, a whole model of its own only its arm."""
    if plan.tuned is None or plan.tuned.is_adapter:
        return [list(arms)] if arms else []
    groups = [[arm for arm in arms if arm != TUNED], [arm for arm in arms if arm == TUNED]]
    return [group for group in groups if group]


def _has_adapter(plan: EvaluationPlan, arms: Sequence[str]) -> bool:
    return TUNED in arms and plan.tuned is not None and plan.tuned.is_adapter


def _served(plan: EvaluationPlan, arms: Sequence[str], processor: Any) -> Served:
    settings = plan.recipe.model
    if TUNED in arms and plan.tuned is not None and not plan.tuned.is_adapter:
        settings = tuned_settings(settings, plan.tuned)
    model, size = download(settings), processor.image_processor.size
    limits = {name: int(size[name]) for name in ("shortest_edge", "longest_edge") if size.get(name)}
    if plan.tuned is None or not _has_adapter(plan, arms):
        return Served(model, settings.dtype, limits=limits)
    adapter = plan.tuned.folder
    config, vision = read_adapter_config(adapter), changes_vision(adapter / ADAPTER_FILE)
    return Served(model, settings.dtype, adapter, config, vision, limits)


def _size(task: Task, encoders: Any, rows: set[int], max_new_tokens: int) -> Size:
    """Return what the rows ask of an engine. Their right answers are counted in, so that it is enough."""
    tokens = images = 0
    for index in rows:
        conversation = task.conversation(index)
        images = max(images, len(conversation.media))
        tokens = max(tokens, *(encoder.measure(conversation).tokens for encoder in encoders))
    return Size(tokens + max_new_tokens, images)


def _ask(
    process: EngineProcess, task: Task, prompts: Prompts, rows: Sequence[int], with_adapter: bool, max_new_tokens: int
) -> dict[int, GeneratedAnswer]:
    """Return the engine's answers to rows; without those that cannot be read and are left out. Raises `UserError`."""
    encoder = prompts.encoder
    with tempfile.TemporaryDirectory() as folder:
        asked = [prompt for index in rows if (prompt := _prompt(task, prompts, index, Path(folder))) is not None]
        found = process.answer(asked, with_adapter, max_new_tokens, encoder.template_options) if asked else []
    return {
        answer.number: replace(read, text=prompts.in_data_coordinates(answer.number, read.text))
        for answer in found
        if (read := _read(answer, encoder))
    }


def _prompt(task: Task, prompts: Prompts, index: int, folder: Path) -> EnginePrompt | None:
    """Return a row's prompt with its images in files, as this package decodes them; None for a row that is left out."""
    try:
        prompts.encode(index)  # proves that it can be read
    except BadRow as error:
        raise UserError(f"{error}; {WAY_OUT}") from None
    if index in prompts.unreadable:
        return None
    conversation: Conversation = prompts.encoder.with_boxes(task.conversation(index))
    files = []
    for item in conversation.media:
        file = folder / f"{item.content_hash}.png"
        if not file.is_file():
            item.decode().save(file, compress_level=1)
        files.append(str(file))
    return engine_prompt(index, conversation, prompts.encoder, files)


def _read(answer: EngineAnswer, encoder: Encoder) -> GeneratedAnswer:
    if answer.answer_ids is None:
        return GeneratedAnswer(f"{encoder.opening}{answer.text}".strip(), True)
    ended = not set(answer_ends(encoder)).isdisjoint(answer.answer_ids)
    return GeneratedAnswer(decode_answer(encoder, answer.answer_ids), ended)


def _own_answers(
    plan: EvaluationPlan, task: Task, arms: Sequence[str]
) -> Iterator[tuple[str, dict[int, GeneratedAnswer]]]:
    """Answer a sample of the rows of each arm with this package's engine; the same rows for all."""
    context, model = read_context(bool(plan.recipe.get("use_cpu"))), None
    sample = even_indices(len(task.questions), SAMPLE)
    units = [
        [sample[place] for place in unit] for unit in plan_units([1] * len(sample), [task.images[i] for i in sample])
    ]
    for arm in arms:
        if arm == TUNED and plan.tuned is not None and not plan.tuned.is_adapter:
            model = None
            gc.collect()
            torch.cuda.empty_cache()
        model = load_arm(plan, arm, model, context)
        encoder = make_encoder(plan, arm, task.processor, task.system_message)
        prompts = Prompts(task.rows, encoder, skip_bad_rows=True)
        engine = Engine(model, encoder, plan.recipe.run.max_new_tokens)
        found: dict[int, GeneratedAnswer] = {}
        with tqdm(total=len(sample), desc=f"sample of {arm}, this package's engine", unit="row") as progress:
            for finished in engine.answers(prompts.encode, units):
                found |= {
                    index: replace(answer, text=prompts.in_data_coordinates(index, answer.text))
                    for index, answer in finished
                    if index not in prompts.unreadable
                }
                progress.update(len(finished))
        yield arm, found
