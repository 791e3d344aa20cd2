"""Accuracy while training: answers to a fixed sample of the evaluation rows at every evaluation, on every strategy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from qwen_vl_sft.atomic_write import atomic_write
from qwen_vl_sft.data.dataset import even_indices
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.errors import BadRow
from qwen_vl_sft.evaluation.metrics import METRICS
from qwen_vl_sft.evaluation.scoring import score_row
from qwen_vl_sft.evaluation.task import Prompts, read_question
from qwen_vl_sft.inference.generation import generate_batches, plan_batches

ARM = "tuned"
ANSWERS_FOLDER = "answers_while_training"


class GenerationMetrics:
    """Has the model in training answer a sample of the evaluation rows, and scores the answers.

    The sample is spread evenly over the rows and is the same at every evaluation. Each process answers its share; the
    scores are means over the whole sample, the same on every process and for any number of them.

    Args:
        evaluation: the checked evaluation rows.
        encoder: makes the prompts, with the system message of training.
        rows: how many rows to answer, None for all.
        batch_size: rows that a process answers together.
        max_new_tokens: most tokens of an answer.
        output_dir: the run folder; the answers of each evaluation are kept below it. None keeps none.
        skip_bad_rows: leave rows out of the scores whose images can be read no longer; otherwise they raise `BadRow`.

    `left_out` is how many of the sample's rows the last scores leave out, on all processes together.
    """

    def __init__(
        self,
        evaluation: Scan,
        encoder: Encoder,
        rows: int | None,
        batch_size: int,
        max_new_tokens: int,
        output_dir: Path | None = None,
        skip_bad_rows: bool = False,
    ) -> None:
        self.sample = even_indices(len(evaluation.rows), rows)
        self.rows = evaluation.rows
        self.prompts = Prompts(evaluation.rows, encoder, skip_bad_rows)
        self.max_new_tokens = max_new_tokens
        self.output_dir = output_dir
        self.left_out = 0
        self.batches = plan_batches([int(evaluation.lengths.tokens[index]) for index in self.sample], batch_size)

    def measure(
        self,
        model: Any,
        accelerator: Any,
        step: int,
        show_progress: bool = False,
        poll: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Return the mean of every metric over the sample, by name. All processes must call at once.

        `model` is the one in training, as the strategy wrapped it. `poll` is called between batches, on all processes
        equally often; what it raises ends the measurement.
        """
        rank, context = accelerator.process_index, accelerator.num_processes
        synced = context > 1 and is_split(model)
        batches = share(self.batches, rank, context, equal=synced)
        answerer = answering_model(model, accelerator)
        answers: dict[int, str] = {}
        # In training it wraps the model's own forward, which `generate` of a model with an adapter does not call.
        autocast = accelerator.autocast
        shown = tqdm(
            generate_batches(
                answerer, self.prompts.encoder, self._prompt, batches, self.max_new_tokens, synced, autocast
            ),
            total=len(batches),
            desc="answering",
            unit="batch",
            leave=False,
            disable=not (show_progress and rank == 0),
        )
        for number, (places, given) in enumerate(shown):
            answers.update(zip(places, (answer.text for answer in given), strict=True))
            if poll is not None and number < len(self.batches) // context:
                poll()
        read = [place for place in answers if self.sample[place] not in self.prompts.unreadable]
        scored = {place: self._score(place, answers[place]) for place in read}
        if self.output_dir is not None:
            self._keep_answers(scored, accelerator, step)
        return self._means(scored, accelerator)

    def _prompt(self, place: int) -> Encoded:
        return self.prompts.encode(self.sample[place])

    def _score(self, place: int, text: str) -> dict[str, Any]:
        raw = self.rows.dataset[self.sample[place]]  # type: ignore[index]
        question = read_question(raw, self.rows.conversation(raw).up_to_last_answer(), self.rows.format)
        return score_row(question, {ARM: text})

    def _means(self, scored: dict[int, dict[str, Any]], accelerator: Any) -> dict[str, float]:
        # Each answer is scored on one process; padding to equal shares scores some twice, with the same result.
        sums = torch.zeros(len(self.sample), len(METRICS) + 1, dtype=torch.float64)
        for place, row in scored.items():
            sums[place] = torch.tensor([*(row["arms"][ARM][metric] for metric in METRICS), 1.0], dtype=torch.float64)
        sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
        sums = sums[sums[:, -1] > 0]
        self.left_out = len(self.sample) - len(sums)
        if not len(sums):
            raise BadRow(f"none of the {len(self.sample)} evaluation rows that are answered can be read any longer")
        means = (sums[:, :-1] / sums[:, -1:]).mean(dim=0).tolist()
        return dict(zip(METRICS, means, strict=True))

    def _keep_answers(self, scored: dict[int, dict[str, Any]], accelerator: Any, step: int) -> None:
        assert self.output_dir is not None
        rows = dict(gather_object([*scored.items()]))
        if accelerator.process_index == 0:
            folder = self.output_dir / ANSWERS_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(rows[place], ensure_ascii=False) + "\n" for place in sorted(rows)]
            atomic_write(folder / f"step-{step:06d}.jsonl", "".join(lines))


def share(batches: Sequence[Sequence[int]], rank: int, context: int, equal: bool) -> list[list[int]]:
    """Return the batches of one process. With `equal`, all get the same number; the last may be repeats."""
    own = [list(batch) for batch in batches[rank::context]]
    if equal and len(own) < math.ceil(len(batches) / context):
        own.append(list(batches[-1]))
    return own


def is_split(model: Any) -> bool:
    """Whether weights of the model lie in pieces on several processes, which must then compute in step."""
    from torch.distributed.fsdp import FSDPModule

    stage = getattr(model, "zero_optimization_stage", None)
    return isinstance(model, FSDPModule) or (stage is not None and stage() == 3)


def answering_model(model: Any, accelerator: Any) -> Any:
    """Return what `generate` is called on. Split weights are gathered layer by layer as in training, never all at once."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if isinstance(model, FSDPModule):
        # FSDP2 gathers what lies outside the layers, such as the embeddings, in the root's `forward` alone.
        if "generate" not in vars(model):
            register_fsdp_forward_method(model, "generate")  # type: ignore[arg-type]
        return model
    return accelerator.unwrap_model(model)
