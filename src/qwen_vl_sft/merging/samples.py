"""Rows of the run on which a merged model is compared. They are read before anything is merged."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoProcessor

from qwen_vl_sft.data.dataset import Rows, in_memory, open_rows, spread
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.data.rows import Conversation, resolve_system_message
from qwen_vl_sft.errors import BadRow, UserError
from qwen_vl_sft.evaluation.task import up_to_last_answer
from qwen_vl_sft.merging.plan import Plan
from qwen_vl_sft.outputs.run_folder import SYSTEM_MESSAGE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Samples:
    """Conversations up to the answer that is compared, and the format of the rows that they are."""

    conversations: list[Conversation]
    row_format: str

    def encoder(self, folder: Path) -> Encoder:
        """How the model in `folder` encodes them, under the system message that lies there."""
        message = folder / SYSTEM_MESSAGE
        stored = message.read_text(encoding="utf-8") if message.is_file() else None
        system = resolve_system_message(stored, self.row_format)
        return Encoder(AutoProcessor.from_pretrained(folder), system_message=system)


def read_samples(plan: Plan) -> Samples | None:
    """Rows of the run's evaluation split, else of its training split; None when none are wanted. Raises `UserError`."""
    data, samples = plan.recipe.data, plan.options.samples
    if not samples:
        return None
    try:
        rows = open_rows(
            str(data.dataset_name),
            data.dataset_test_split or data.dataset_train_split,
            data.dataset_config,
            streaming=data.dataset_streaming,
            row_format=data.dataset_format,
            max_rows=samples if data.dataset_streaming else None,
        )
        rows = in_memory(rows) if rows.streamed else spread(rows, samples)
        return Samples(_readable(rows, data.bad_rows == "skip"), rows.format)
    except UserError as error:
        raise UserError(f"--samples: {error}; give --samples 0 to merge without comparing logits") from None


def _readable(rows: Rows, skip_bad_rows: bool) -> list[Conversation]:
    found = []
    for place in range(len(rows)):
        try:
            with rows.opened({"row": place}) as (conversation, _):
                answered = up_to_last_answer(conversation)
                for image in answered.images:
                    image.decode()
                found.append(answered)
        except BadRow as error:
            if not skip_bad_rows:
                raise
            logger.warning("skipped: %s", error)
    if not found:
        raise UserError(f"{rows.name}: none of {len(rows)} rows can be read; see the warnings above")
    return found
