"""What an evaluation asks: the rows of a split with their questions, accepted answers and batches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_vl_sft.arms import choose_arms, load_run_processor, model_identity
from qwen_vl_sft.data import ROW_ID, Rows, open_rows, spread
from qwen_vl_sft.encode import Encoder
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation_options import Plan
from qwen_vl_sft.generation import estimate_length, plan_batches
from qwen_vl_sft.rows import Conversation, resolve_system_message
from qwen_vl_sft.scoring import SPLIT_COLUMN, Question, split_name


@dataclass(frozen=True)
class Task:
    """What is to be answered: the rows, their questions, and the batches, which hold places in `questions`."""

    rows: Rows
    questions: list[Question]
    batches: list[list[int]]
    arms: tuple[str, ...]
    system_message: str
    processor: Any

    def conversation(self, place: int) -> Conversation:
        """The conversation of a place, up to the answer that is scored."""
        return up_to_last_answer(self.rows.conversation(self.rows.dataset[place]))


def prepare(plan: Plan) -> Task:
    """Open the rows, read their questions and lengths, and form the batches. Raises `UserError`, decodes no image."""
    data, options = plan.recipe.data, plan.options
    if not data.dataset_name:
        raise UserError("dataset_name is not set, neither by --run nor by --dataset_name; name a dataset")
    rows = spread(
        open_rows(data.dataset_name, options.split, data.dataset_config, row_format=data.dataset_format),
        options.max_samples,
    )
    message = resolve_system_message(plan.system_message, rows.format) or ""
    arms = choose_arms(plan, message)
    processor = load_run_processor(plan)
    encoder = Encoder(processor)
    questions, lengths = [], []
    for place in range(len(rows)):
        raw = rows.dataset[place]
        conversation = up_to_last_answer(rows.conversation(raw))
        questions.append(read_question(raw, conversation, rows.format))
        lengths.append(estimate_length(encoder, conversation))
    return Task(rows, questions, plan_batches(lengths, options.batch_size), arms, message, processor)


def up_to_last_answer(conversation: Conversation) -> Conversation:
    """The conversation without what follows its last assistant turn, which is the one that is scored."""
    messages = conversation.messages
    last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
    kept = messages[: last + 1]
    images = sum(part["type"] == "image" for message in kept for part in message["content"])
    return Conversation(kept, conversation.images[:images])


def read_question(raw: Mapping[str, Any], conversation: Conversation, row_format: str) -> Question:
    """The question and the accepted answers of a row: every entry of ChartQA's label list, else the last answer."""
    texts = ["".join(part.get("text", "") for part in message["content"]) for message in conversation.messages]
    asked = [text for text, turn in zip(texts, conversation.messages, strict=True) if turn["role"] == "user"]
    label = raw["label"] if row_format == "chartqa" else texts[-1]
    answers = [text for text in label if text] if isinstance(label, list) else [label]
    return Question(raw[ROW_ID], asked[-1] if asked else "", answers, split_name(raw.get(SPLIT_COLUMN)))


def describe_task(plan: Plan, task: Task) -> dict[str, Any]:
    """Everything that the answers depend on, as plain values: a run is resumed only under the same."""
    size = task.processor.image_processor.size
    described = {
        "dataset": task.rows.name,
        "dataset_config": plan.recipe.data.dataset_config,
        "rows": len(task.questions),
        "batch_size": plan.options.batch_size,
        "max_new_tokens": plan.options.max_new_tokens,
        "system_message": task.system_message,
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
    }
    return json.loads(json.dumps(described | model_identity(plan)))
