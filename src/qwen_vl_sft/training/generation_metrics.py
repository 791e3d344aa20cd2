"""Accuracy while training: answers to a fixed sample of the evaluation rows at every evaluation, on every strategy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from qwen_vl_sft.atomic_write import atomic_write
from qwen_vl_sft.data.dataset import even_indices
from qwen_vl_sft.data.encoding import Encoded, Encoder
from qwen_vl_sft.data.feature_cache import FeatureCache
from qwen_vl_sft.data.media import ReadMedia
from qwen_vl_sft.data.scan import Scan
from qwen_vl_sft.errors import BadRow, UserError
from qwen_vl_sft.evaluation.answer_files import deal
from qwen_vl_sft.evaluation.box_metrics import score_boxes, targets_of
from qwen_vl_sft.evaluation.metrics import ALL_METRICS, HEADLINE, METRICS
from qwen_vl_sft.evaluation.scoring import score_row
from qwen_vl_sft.evaluation.task import Prompts, read_question
from qwen_vl_sft.inference.engine.engine import Engine
from qwen_vl_sft.inference.engine.features import FeatureMemory
from qwen_vl_sft.inference.generation import GeneratedAnswer, plan_units
from qwen_vl_sft.inference.padded_batches import generate_batches, plan_batches
from qwen_vl_sft.modeling.base_model import is_vision_frozen

ARM = "tuned"
ANSWERS_FOLDER = "answers_while_training"
# Memory of each process for features of images, which a frozen tower gives at every evaluation alike.
FEATURE_BYTES = 2**30


class GenerationMetrics:
    """Has the model in training answer a sample of the evaluation rows, and scores the answers.

    The sample is spread evenly over the rows and is the same at every evaluation. Each process answers its share; the
    scores are means over the whole sample, the same on every process and for any number of them.

    Args:
        evaluation: the checked evaluation rows.
        encoder: makes the prompts, with the system message of training.
        rows: how many rows to answer, None for all.
        batch_size: rows that a process answers together where weights are split; elsewhere memory says how many, and
            this is after how many of them `measure` polls.
        max_new_tokens: most tokens of an answer.
        output_dir: the run folder; the answers of each evaluation are kept below it. None keeps none.
        kept_features: what the tower made of images, on disk in the model's own precision, to be read where it is frozen.
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
        kept_features: FeatureCache | None = None,
    ) -> None:
        self.sample = even_indices(len(evaluation.rows), rows)
        self.rows = evaluation.rows
        self.prompts = Prompts(evaluation.rows, encoder, skip_bad_rows)
        self.max_new_tokens = max_new_tokens
        self.output_dir = output_dir
        self.left_out = 0
        self.batch_size = batch_size
        lengths = [int(evaluation.lengths.tokens[index]) for index in self.sample]
        prefixes = [int(evaluation.lengths.prefix[index]) for index in self.sample]
        self.batches = plan_batches(lengths, batch_size)
        self.units = plan_units(lengths, [(prefix,) if prefix >= 0 else () for prefix in prefixes])
        self.features = FeatureMemory(FEATURE_BYTES, kept_features)

    def check_measures(self, metric: str) -> None:
        """Raise `UserError` for a metric of boxes or points that no row of the sample has in its right answer."""
        if metric in METRICS or metric not in ALL_METRICS:
            return
        for place in self.sample:
            try:
                targets = targets_of(self.rows.conversation({"row": place}).up_to_last_answer())
            except BadRow:
                continue  # told where the row is answered
            if metric in score_boxes("", targets):
                return
        raise UserError(
            f"metric_for_best_model: {metric} is measured where right answers hold boxes or points, and none of the"
            f" {len(self.sample)} evaluation rows that are answered does; for boxes in texts set box_coordinates, or choose"
            f" {HEADLINE}"
        )

    def measure(
        self,
        model: Any,
        accelerator: Any,
        step: int,
        show_progress: bool = False,
        poll: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Return the mean of every metric over the rows of the sample that have it, by name. All processes must call at once.

        `model` is the one in training, as the strategy wrapped it. `poll` is called now and then, on all processes equally
        often; what it raises ends the measurement.
        """
        rank, processes = accelerator.process_index, accelerator.num_processes
        synced = processes > 1 and is_split(model)
        answering = self._in_step if synced else self._on_its_own
        # Each process polls when it has answered so many rows; the one with the fewest rows says how often that is.
        batches = len(self.batches) // processes
        shares = [sum(map(len, deal(self.units, (), other, processes))) for other in range(processes)]
        polls = batches if synced else min(shares) // self.batch_size
        answers: dict[int, str] = {}
        with tqdm(
            total=len(self.sample) if synced else shares[rank],
            desc="answering",
            unit="row",
            leave=False,
            disable=not (show_progress and rank == 0),
        ) as progress:
            polled = 0
            with closing(answering(answering_model(model, accelerator), accelerator)) as finished:
                for number, given in enumerate(finished, start=1):
                    for place, answer in given:
                        answers[place] = self.prompts.in_data_coordinates(self.sample[place], answer.text)
                    progress.update(len(given) * (processes if synced else 1))
                    due = number if synced else len(answers) // self.batch_size
                    while poll is not None and polled < min(due, polls):
                        polled += 1
                        poll()
        if torch.cuda.is_available():
            # The cache of keys and values is large; training takes its memory in other pieces.
            torch.cuda.empty_cache()
        read = [place for place in answers if self.sample[place] not in self.prompts.unreadable]
        scored = {place: self._score(place, answers[place]) for place in read}
        if self.output_dir is not None:
            self._keep_answers(scored, accelerator, step)
        return self._means(scored, accelerator)

    def _in_step(self, model: Any, accelerator: Any) -> Generator[list[tuple[int, GeneratedAnswer]], None, None]:
        """Answer as many padded batches as every other process, whose parts of the weights each step needs."""
        batches = share(self.batches, accelerator.process_index, accelerator.num_processes)
        # In training autocast wraps the model's own forward, which `generate` of a model with an adapter does not call.
        for places, given in generate_batches(
            model, self.prompts.encoder, self._prompt, batches, self.max_new_tokens, True, accelerator.autocast
        ):
            yield list(zip(places, given, strict=True))

    def _on_its_own(self, model: Any, accelerator: Any) -> Generator[list[tuple[int, GeneratedAnswer]], None, None]:
        """Answer this process's rows with the engine."""
        own = deal(self.units, (), accelerator.process_index, accelerator.num_processes)
        engine = Engine(
            model,
            self.prompts.encoder,
            self.max_new_tokens,
            memory=self.features if is_vision_frozen(model) else None,
            autocast=accelerator.autocast,
        )
        yield from engine.answers(self._prompt, own)

    def _prompt(self, place: int, read_media: ReadMedia | None = None) -> Encoded:
        return self.prompts.encode(self.sample[place], read_media)

    def _score(self, place: int, text: str) -> dict[str, Any]:
        raw = self.rows.dataset[self.sample[place]]  # type: ignore[index]
        question = read_question(raw, self.rows.conversation(raw).up_to_last_answer(), self.rows.format)
        return score_row(question, {ARM: text})

    def _means(self, scored: dict[int, dict[str, Any]], accelerator: Any) -> dict[str, float]:
        # Each answer is scored on one process; padding to equal shares scores some twice, with the same result.
        # For each metric the sum and the number of scores, since not every row has every metric.
        sums = torch.zeros(len(self.sample), 2, len(ALL_METRICS), dtype=torch.float64)
        for place, row in scored.items():
            scores = row["arms"][ARM]
            sums[place, 0] = torch.tensor([scores.get(metric, 0.0) for metric in ALL_METRICS])
            sums[place, 1] = torch.tensor([float(metric in scores) for metric in ALL_METRICS])
        sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
        self.left_out = int((sums[:, 1].sum(dim=1) == 0).sum())
        if self.left_out == len(self.sample):
            raise BadRow(f"none of the {len(self.sample)} evaluation rows that are answered can be read any longer")
        means = {}
        for number, metric in enumerate(ALL_METRICS):
            measured = sums[sums[:, 1, number] > 0][:, :, number]
            if len(measured):
                means[metric] = float((measured[:, 0] / measured[:, 1]).mean())
        return means

    def _keep_answers(self, scored: dict[int, dict[str, Any]], accelerator: Any, step: int) -> None:
        assert self.output_dir is not None
        rows = dict(gather_object([*scored.items()]))
        if accelerator.process_index == 0:
            folder = self.output_dir / ANSWERS_FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(rows[place], ensure_ascii=False) + "\n" for place in sorted(rows)]
            atomic_write(folder / f"step-{step:06d}.jsonl", "".join(lines))


def share(batches: Sequence[Sequence[int]], rank: int, processes: int) -> list[list[int]]:
    """Return the batches of one process. All get the same number; the last may be repeats."""
    own = [list(batch) for batch in batches[rank::processes]]
    if len(own) < math.ceil(len(batches) / processes):
        own.append(list(batches[-1]))
    return own


def is_split(model: Any) -> bool:
    """Return whether weights of the model lie in pieces on several processes, which must then compute in step."""
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
