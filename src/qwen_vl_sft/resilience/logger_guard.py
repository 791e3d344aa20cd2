"""Loggers such as TensorBoard and Weights & Biases: report one that fails, drop it, and continue training."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qwen_vl_sft.errors import first_line

_EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


def guard_loggers(trainer: Any) -> None:
    """Keep loggers of `report_to` from ending a run: their first error goes to the trainer's `failed_loggers` and stderr.

    Everything that is logged stands in training_log.jsonl as well.
    """
    names = {callback: name for name, callback in INTEGRATION_TO_CALLBACK.items()}
    for callback in trainer.callback_handler.callbacks:
        name = names.get(type(callback))
        if name is not None:
            for event in _EVENTS:
                setattr(callback, event, _guarded(getattr(callback, event), name, trainer.failed_loggers))


def _guarded(event: Callable[..., Any], name: str, failed: dict[str, str]) -> Callable[..., Any]:
    @functools.wraps(event)
    def report(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if name in failed:
            return None
        try:
            return event(args, state, control, **kwargs)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {first_line(error)}, at step {state.global_step}"
            print(
                f"warning: report_to: {name} failed ({failed[name]}); training goes on without it, and"
                f" training_log.jsonl will hold what it misses",
                file=sys.stderr,
                flush=True,
            )
            return None

    return report
