"""Training rows of a run as inputs of its model, by which a converter measures what the layers see."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from tqdm import tqdm

from qwen_vl_sft.batching.collator import pad
from qwen_vl_sft.data.dataset import in_memory, open_split, select_evenly
from qwen_vl_sft.data.encoding import Encoder
from qwen_vl_sft.errors import BadRow, UserError
from qwen_vl_sft.evaluation.options import EvaluationPlan
from qwen_vl_sft.evaluation.task import WAY_OUT


def write_calibration(plan: EvaluationPlan, encoder: Encoder, most: int, folder: Path) -> int:
    """Write at most `most` training rows, evenly spaced, each as the arguments of a forward; return how many.

    A row is prompt and answer, as in training. Raises `UserError`.
    """
    data = plan.recipe.data
    rows = open_split(data, data.dataset_train_split, max_rows=most if data.dataset_streaming else None)
    rows = in_memory(rows) if rows.streamed else select_evenly(rows, most)
    written = 0
    for number in tqdm(range(len(rows)), desc="calibration", unit="row"):
        try:
            with rows.opened({"row": number}) as (conversation, _):
                batch = pad([encoder.encode(conversation)], encoder.pad_token_id)
        except BadRow as error:
            if data.bad_rows == "skip":
                continue
            raise UserError(f"--calibration_samples: {error}; {WAY_OUT}") from None
        del batch["labels"]
        save_file({name: tensor.contiguous() for name, tensor in batch.items()}, folder / f"{written:05d}.safetensors")
        written += 1
    return written
