"""Loggers such as TensorBoard and Weights & Biases: report one that fails, drop it, and continue training."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qwen_vl_sft.errors import first_line

_EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


def guard_loggers(callbacks: Iterable[TrainerCallback]) -> dict[str, str]:
    """Keep the run alive when a logger of `report_to` fails: print its first error, then stop calling it.

    Returns the error of each failed logger by name, filled in while training. training_log.jsonl has every log entry as
    well.
    """
    names = {callback: name for name, callback in INTEGRATION_TO_CALLBACK.items()}
    failed: dict[str, str] = {}
    for callback in callbacks:
        name = names.get(type(callback))
        if name is not None:
            for event in _EVENTS:
                setattr(callback, event, _guarded(getattr(callback, event), name, failed))
    return failed


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
                f"warning: report_to: {name} failed ({failed[name]}); training continues without it;"
                f" training_log.jsonl has every entry",
                file=sys.stderr,
                flush=True,
            )
            return None

    return report
