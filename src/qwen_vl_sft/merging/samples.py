"""Read the rows on which a merged model is compared, before anything is merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor

from qwen_vl_sft import tiny
from qwen_vl_sft.checkpointing.run_folder import SYSTEM_MESSAGE
from qwen_vl_sft.data.conversation import Conversation
from qwen_vl_sft.data.dataset import in_memory, open_split, select_evenly
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.formats.base import DataFormat
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.evaluation.task import read_usable
from qwen_vl_sft.families.registry import family_of
from qwen_vl_sft.merging.plan import MergePlan
from qwen_vl_sft.modeling.base_model import check_chat_template


@dataclass(frozen=True)
class Samples:
    """Conversations up to the answer that is compared, the format of their rows, and whether answers begin with a thought."""

    conversations: list[Conversation]
    row_format: DataFormat
    enable_thinking: bool

    def encoder(self, folder: Path) -> Encoder:
        """Return the encoder of the model in `folder`, with the system message that lies there."""
        message = folder / SYSTEM_MESSAGE
        stored = message.read_text(encoding="utf-8") if message.is_file() else None
        system = self.row_format.resolve_system_message(stored)
        chat = family_of(AutoConfig.from_pretrained(folder)).chat_with(self.enable_thinking)
        processor = AutoProcessor.from_pretrained(folder)
        check_chat_template(processor, f"--samples: {folder}")
        return Encoder(processor, system_message=system, chat=chat)


def read_samples(plan: MergePlan) -> Samples | None:
    """Read rows of the run's evaluation split, else of its training split; None when none are wanted. Raises `UserError`.

    The adapter of another trainer, whose data nothing names, is compared on the charts that come with the package.
    """
    data, samples = plan.recipe.data, plan.options.samples
    if not samples:
        return None
    if data.dataset_name is None and plan.tuned.recipe_file is None:
        data = replace(data, dataset_name=str(tiny.DATA_DIR), dataset_test_split="test")
    try:
        split = data.dataset_test_split or data.dataset_train_split
        rows = open_split(data, split, max_rows=samples if data.dataset_streaming else None)
        rows = in_memory(rows) if rows.streamed else select_evenly(rows, samples)
        found = read_usable(rows, _with_images, data.bad_rows == "skip")
        return Samples([*found.values()], rows.format, data.enable_thinking)
    except UserError as error:
        raise UserError(f"--samples: {error}; give --samples 0 to merge without comparing logits") from None


def _with_images(raw: Mapping[str, Any], conversation: Conversation) -> Conversation:
    """Return the conversation after decoding its images. Raises `BadRow`."""
    for image in conversation.media:
        image.decode()
    return conversation
