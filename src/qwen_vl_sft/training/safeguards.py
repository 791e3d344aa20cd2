"""The pieces that keep a run safe, made for one trainer: checkpoints, steps, the evaluation due, the watchdog."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from qwen_vl_sft.checkpointing.checkpoints import Checkpoint, folder_of
from qwen_vl_sft.checkpointing.writer import CheckpointWriter
from qwen_vl_sft.resilience.due_evaluation import DueEvaluation
from qwen_vl_sft.resilience.step_guard import StepGuard
from qwen_vl_sft.resilience.watchdog import Watchdog


@dataclass(frozen=True)
class Safeguards:
    """What a trainer hands its steps, evaluations and checkpoints to.

    Args:
        writer: writes checkpoints.
        guard: watches every step for losses and gradients that are not finite.
        evaluations: knows of an evaluation that is due.
        watchdog: told where this process is.
        totals: what the run had come to at the checkpoint that it is resumed from (`VisionSFTTrainer.totals`).
    """

    writer: CheckpointWriter
    guard: StepGuard
    evaluations: DueEvaluation
    watchdog: Watchdog
    totals: Mapping[str, Any]


def make_safeguards(
    args: TrainingArguments,
    signature: Mapping[str, Any] | None = None,
    resume: Checkpoint | None = None,
    skips_nonfinite: bool = False,
    can_skip: bool = True,
) -> Safeguards:
    """Make the pieces for a trainer of these arguments.

    Args:
        args: the trainer's arguments.
        signature: of the run (`run_signature`); None for one that tells the number of processes alone.
        resume: the checkpoint that the run is resumed from.
        skips_nonfinite: leave out steps that are not finite.
        can_skip: whether that would work.
    """
    run = Path(args.output_dir or "")
    signature = signature or {"world": {"processes": args.world_size}}
    # A checkpoint of another folder, or under another name, is none of this run's.
    own = resume is not None and resume.path.resolve() == folder_of(run, resume.step).resolve()
    return Safeguards(
        CheckpointWriter(
            run,
            signature,
            args.save_total_limit,
            resume.step if resume and own else 0,
            args.process_index,
            args.world_size,
        ),
        StepGuard(args.device, skips_nonfinite, can_skip),
        DueEvaluation(args, due=resume is not None and resume.evaluation_due),
        Watchdog(run, args.process_index, args.world_size, args.ddp_timeout),
        resume.totals if resume else {},
    )
