"""The task of an evaluation: rows of a split with their questions, accepted answers and batches."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from qwen_vl_sft.data.boxes import answer_in_data_coordinates, boxes_of
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.dataset import ROW_ID, Rows, open_split, select_evenly
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.data.formats.base import DataFormat
from qwen_vl_sft.data.media import ReadMedia
from qwen_vl_sft.errors import BadRow, UserError
from qwen_vl_sft.evaluation.box_metrics import targets_of
from qwen_vl_sft.evaluation.options import EvaluationPlan
from qwen_vl_sft.evaluation.scoring import SPLIT_COLUMN, Question, split_name
from qwen_vl_sft.inference.generation import estimate_length, plan_units
from qwen_vl_sft.inference.models import load_run_processor
from qwen_vl_sft.inference.source import ARMS, TunedModel
from qwen_vl_sft.inference.trained_base import check_trained_base

logger = logging.getLogger(__name__)
Read = TypeVar("Read")
# How rows are answered; another way may round otherwise in half precision, so an evaluation goes on in its own alone.
ENGINE = "packed prompts, continuous batch"
# Stands for a row that cannot be read.
_STAND_IN = Conversation([{"role": "user", "content": [{"type": "text", "text": "?"}]}], [])
WAY_OUT = "fix it, or leave such rows out with --bad_rows skip"


@dataclass(frozen=True)
class Task:
    """What is to be answered: the rows, their questions, and the units, which hold places in `questions`.

    Rows of a unit show the same images; a process answers all of a unit.

    `rows_digest` tells whether other rows are the same ones. `left_out` rows of the split are not among them, since they
    cannot be used. `images` has for each question the hashes of its images.
    """

    rows: Rows
    questions: list[Question]
    units: list[list[int]]
    arms: tuple[str, ...]
    system_message: str
    processor: Any
    rows_digest: str
    left_out: int = 0
    images: Sequence[tuple[str, ...]] = ()

    def conversation(self, index: int) -> Conversation:
        """Return the conversation of a place, up to the answer that is scored."""
        return self.rows.conversation(self.rows.dataset[index]).up_to_last_answer()


class Prompts:
    """Encodes the questions of rows, each up to the answer that is scored.

    A row that cannot be read raises `BadRow` with its name. With `skip_bad_rows` something else stands in its place, so
    that processes keep their shares, and the row is in `unreadable` from then on.
    """

    def __init__(self, rows: Rows, encoder: Encoder, skip_bad_rows: bool = False) -> None:
        self.rows = rows
        self.encoder = encoder
        self.skip_bad_rows = skip_bad_rows
        self.unreadable: set[int] = set()
        self._with_boxes: set[int] = set()

    def encode(self, index: int, read_media: ReadMedia | None = None) -> Encoded:
        """Encode the prompt of the row at this index; `read_media` as in `Encoder.encode_prompt`."""
        self.unreadable.discard(index)
        try:
            with self.rows.opened({"row": index}) as (conversation, _):
                if boxes_of(conversation.up_to_last_answer().messages[-1]):
                    self._with_boxes.add(index)
                return self.encoder.encode_prompt(conversation.up_to_last_answer(), read_media)
        except BadRow as error:
            if not self.skip_bad_rows:
                raise
            logger.warning("skipped: %s", error)
            self.unreadable.add(index)
            return self.encoder.encode_prompt(_STAND_IN)

    def in_data_coordinates(self, index: int, answer: str) -> str:
        """Return the answer to an encoded prompt with its boxes in the coordinates of the data."""
        if index not in self._with_boxes:
            return answer
        with self.rows.opened({"row": index}) as (conversation, _):
            encoder = self.encoder
            return answer_in_data_coordinates(
                answer, conversation.up_to_last_answer(), encoder.boxes, encoder.processor
            )


def prepare(plan: EvaluationPlan) -> Task:
    """Open the rows, read their questions and lengths, and form the units. Raises `UserError`, decodes no image."""
    data, options = plan.recipe.data, plan.options
    if not data.dataset_name:
        raise UserError("dataset_name is not set, neither by --run nor by --dataset_name; name a dataset")
    rows = select_evenly(open_split(data, options.split, streaming=False), options.max_samples)
    message = rows.format.resolve_system_message(plan.system_message) or ""
    arms = choose_arms(plan, message)
    if "tuned" in arms:
        check_trained_base(plan)
    processor = load_run_processor(plan)
    found = _measured(rows, Encoder(processor), data.bad_rows == "skip")
    units = plan_units([row.length for row in found.values()], [row.images for row in found.values()])
    left_out = len(rows) - len(found)
    return Task(
        rows.select([*found]) if left_out else rows,
        [row.question for row in found.values()],
        units,
        arms,
        message,
        processor,
        hashlib.sha256("".join(row.digest for row in found.values()).encode()).hexdigest()[:16],
        left_out,
        [row.images for row in found.values()],
    )


@dataclass(frozen=True)
class _Measured:
    """The question of a row, the estimated length of its prompt in tokens, its images, and a digest of all that it asks."""

    question: Question
    length: int
    images: tuple[str, ...]
    digest: str


def _measured(rows: Rows, encoder: Encoder, skip_bad_rows: bool) -> dict[int, _Measured]:
    """Measure each row before it is asked, by the row's index."""

    def read(raw: Mapping[str, Any], conversation: Conversation) -> _Measured:
        question = read_question(raw, conversation, rows.format)
        encoder.with_boxes(conversation)  # refuses those outside the image
        length, digest = estimate_length(encoder, conversation), digest_of_row(question, conversation)
        return _Measured(question, length, tuple(item.content_hash for item in conversation.media), digest)

    try:
        return read_usable(rows, read, skip_bad_rows)
    except BadRow as error:
        raise UserError(f"{error}; {WAY_OUT}") from None


def read_usable(
    rows: Rows, read: Callable[[Mapping[str, Any], Conversation], Read], skip_bad_rows: bool
) -> dict[int, Read]:
    """Apply `read` to each row and its conversation up to the last answer; return the results by the row's index.

    A row that cannot be used raises `BadRow` with its name; with `skip_bad_rows` it is left out. Raises `UserError` when
    none is left.
    """
    found = {}
    for index in range(len(rows)):
        raw = rows.dataset[index]
        try:
            with rows.opened(raw) as (conversation, _):
                found[index] = read(raw, conversation.up_to_last_answer())
        except BadRow as error:
            if not skip_bad_rows:
                raise
            logger.warning("skipped: %s", error)
    if not found:
        raise UserError(f"{rows.name}: none of its {len(rows)} rows can be used; see the warnings above")
    return found


def read_question(raw: Mapping[str, Any], conversation: Conversation, row_format: DataFormat) -> Question:
    """Return the question of a row and the answers that its format accepts; the conversation ends at the last answer.

    Raises `BadRow` for an answer that calls a tool: the metrics compare words.
    """
    if "tool_calls" in conversation.messages[-1]:
        raise BadRow("ends with the call of a tool, which no metric scores; leave such rows out of what is evaluated")
    answers, split = row_format.accepted_answers(raw, conversation), split_name(raw.get(SPLIT_COLUMN))
    return Question(raw[ROW_ID], conversation.last_question, answers, split, targets_of(conversation))


def digest_of_row(question: Question, conversation: Conversation) -> str:
    """Digest what a row asks and accepts; its images count with their encoded bytes. Raises `BadRow`."""
    asked = asdict(question)
    if not question.boxes:
        del asked["boxes"]  # so that older evaluations can be resumed
    content = [asked, conversation.messages, [item.content_hash for item in conversation.media]]
    content += [conversation.tools] if conversation.tools else []
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def describe_task(plan: EvaluationPlan, task: Task) -> dict[str, Any]:
    """Return everything that the answers depend on as plain values: a run is resumed only under the same."""
    size = task.processor.image_processor.size
    described = {
        "dataset": task.rows.name,
        "dataset_config": plan.recipe.data.dataset_config,
        "rows": len(task.questions),
        "rows_digest": task.rows_digest,
        "engine": plan.options.engine or ENGINE,
        "batch_size": plan.options.batch_size,
        "max_new_tokens": plan.recipe.run.max_new_tokens,
        "system_message": task.system_message,
        **({"enable_thinking": True} if plan.recipe.data.enable_thinking else {}),
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
    }
    return json.loads(json.dumps(described | model_identity(plan, task.arms)))


def choose_arms(plan: EvaluationPlan, system_message: str) -> tuple[str, ...]:
    """Return the arms of --arms, else all that differ, ordered so that one loaded model serves them all."""
    if plan.options.arms is not None:
        if "prompted" in plan.options.arms and not system_message:
            raise UserError(
                "--arms: prompted is the base model with a system message, and there is none, so it would repeat base;"
                " leave it out, or give --system_message"
            )
        return tuple(arm for arm in ARMS if arm in plan.options.arms)
    return ("base", *(["prompted"] if system_message else []), *(["tuned"] if plan.tuned else []))


def weight_files(tuned: TunedModel | None) -> list[list[Any]]:
    """Return name, size and time of each weight file of a run: a resumed evaluation must find the same."""
    files = sorted(tuned.folder.glob("*.safetensors")) if tuned else []
    return [[path.name, path.stat().st_size, int(path.stat().st_mtime)] for path in files]


def model_identity(plan: EvaluationPlan, arms: Sequence[str]) -> dict[str, Any]:
    """Return the model settings and weights that the answers depend on, as plain values. Raises `UserError`."""
    settings = asdict(plan.recipe.model)
    lora = [name for name in settings if name.startswith(("lora", "use_peft", "use_rslora", "use_dora", "freeze"))]
    weights = {
        "base_weights": _base_weights(plan, arms),
        "run": str(plan.tuned.folder) if plan.tuned else None,
        "run_weights": weight_files(plan.tuned),
    }
    return {name: value for name, value in settings.items() if name not in lora} | weights


def _base_weights(plan: EvaluationPlan, arms: Sequence[str]) -> str | None:
    """Return the base model's commit or files; None where it is gone and no arm needs it. Raises `UserError`."""
    from qwen_vl_sft.modeling.base_identity import identity_of_base

    # Recorded also where no arm needs it: --resume may add one that does.
    try:
        return identity_of_base(plan.recipe.model)
    except UserError:
        if plan.tuned and not plan.tuned.is_adapter and set(arms) == {"tuned"}:
            return None
        raise
