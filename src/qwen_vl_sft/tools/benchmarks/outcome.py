"""What a run of scripts/sft.py came to: its speed, its losses, its weights, or why there are none."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_vl_sft.checkpointing import run_folder
from qwen_vl_sft.checkpointing.row_log import read_row_log
from qwen_vl_sft.errors import EXIT_USER_ERROR

MEASURED = (
    "rows_per_second",
    "images_per_second",
    "tokens_per_second",
    "tflops_per_gpu",
    "mfu",
    "data_wait",
)
PEAK = "peak_memory_gib"
# How torch's launcher, and accelerate's for one process, tell the exit code of the script.
_USER_ERROR_OF_LAUNCHER = re.compile(rf"exitcode\s*: {EXIT_USER_ERROR}\b|exit status {EXIT_USER_ERROR}\b")
_MESSAGE = re.compile(r"^error: (?:\d+ problems\n  - )?(.+)", re.MULTILINE)


def finished(run: Path, warmup: int) -> dict[str, Any]:
    """Losses and gradient norms of every step, and the medians of the speeds that were logged after `warmup` steps."""
    lines = (run / run_folder.LOG).read_text(encoding="utf-8").splitlines()
    entries = [entry for entry in map(json.loads, lines) if "loss" in entry]
    counted = [entry for entry in entries if entry["step"] > warmup and "rows_per_second" in entry]
    found: dict[str, Any] = {
        name: statistics.median(entry[name] for entry in counted) for name in MEASURED if name in counted[0]
    }
    if PEAK in counted[-1]:
        found[PEAK] = counted[-1][PEAK]
    return {
        **found,
        "counted_steps": len(counted),
        "losses": [entry["loss"] for entry in entries],
        "grad_norms": [entry["grad_norm"] for entry in entries],
    }


def machine_of(run: Path) -> dict[str, Any]:
    """What the results of a finished run hold for: versions, commit, GPUs, CPU cores."""
    environment = json.loads((run / run_folder.ENVIRONMENT).read_text(encoding="utf-8"))
    told = {name: environment[name] for name in ("versions", "python", "devices", "git_commit")}
    return {**told, "cpu_cores": os.cpu_count()}


def stopped(code: int | None, run: Path, log: Path, timeout: float) -> str:
    """Why a run has no result, in words. `code` is the launcher's, None when the time was up."""
    if code is None:
        return f"failed: not done after {timeout:.0f} s; see {log}"
    text = log.read_text(encoding="utf-8", errors="replace")
    message = _MESSAGE.search(text)
    if message and (code == EXIT_USER_ERROR or _USER_ERROR_OF_LAUNCHER.search(text)):
        # A run that has trained was not refused: out of memory, a NaN.
        word = "failed" if max(read_row_log(run), default=0) or "out of memory" in message[1] else "refused"
        return f"{word}: {first_sentence(message[1])}"
    return f"failed: see {log}"


def first_sentence(text: str) -> str:
    """Up to the first full stop or semicolon that ends a clause."""
    return re.split(r"[.;](?=\s|$)", text.strip(), maxsplit=1)[0]


def differences(
    result: Mapping[str, Any], reference: Mapping[str, Any], run: Path, reference_run: Path
) -> dict[str, float | None]:
    """How far a run is from the reference: the largest of all steps, and of all tensors of the final weights."""
    return {
        "loss_difference": largest_difference(result["losses"], reference["losses"]),
        "grad_norm_difference": largest_difference(result["grad_norms"], reference["grad_norms"]),
        "weights_difference": weights_difference(run, reference_run),
    }


def largest_difference(values: list[float], reference: list[float]) -> float | None:
    """The largest absolute difference of two curves; None when they have not the same steps."""
    if len(values) != len(reference):
        return None
    return max((abs(value - other) for value, other in zip(values, reference, strict=True)), default=None)


def weights_difference(run: Path, reference: Path) -> float | None:
    """The largest of |a - b| / |b| (Frobenius norms) over the tensors of the reference, None when the run lacks one.

    A run may hold more: ZeRO-1 and ZeRO-2 save an output head that is tied to the embeddings once more by itself.
    """
    ours, theirs = _tensors(run), _tensors(reference)
    if not theirs or not set(theirs) <= set(ours):
        return None
    return max(_relative(_load(ours[name], name), _load(theirs[name], name)) for name in theirs)


def _relative(weight: Any, reference: Any) -> float:
    weight, reference = weight.double(), reference.double()
    distance, size = float((weight - reference).norm()), float(reference.norm())
    return distance / size if size else (0.0 if distance == 0 else float("inf"))


def _tensors(run: Path) -> dict[str, Path]:
    return dict(_names(sorted(run.glob("*.safetensors"))))


def _names(files: list[Path]) -> Iterator[tuple[str, Path]]:
    from safetensors import safe_open

    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                yield name, path


def _load(path: Path, name: str) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
