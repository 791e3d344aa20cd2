"""Command-line options of export.py, and the export that they describe."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_vl_sft.config.command_line import REQUIRED, option, recipe_keys
from qwen_vl_sft.errors import UserError
from qwen_vl_sft.serving.base import ServingEngine

if TYPE_CHECKING:
    from qwen_vl_sft.evaluation.options import EvaluationPlan

KEYS = (
    "dataset_name",
    "dataset_config",
    "dataset_revision",
    "image_folder",
    "dataset_format",
    "bad_rows",
    "max_new_tokens",
    "use_cpu",
)
# How llm-compressor names what `--to` asks for.
SCHEMES = {"compressed-tensors": "W4A16", "awq": "AWQ", "fp8": "FP8"}


@dataclass(frozen=True)
class ExportOptions:
    """Command-line options of export.py."""

    run: Path = option(
        REQUIRED, "folder of scripts/merge.py, or a run; for one with an adapter --to gguf", metavar="folder"
    )
    to: Literal["gguf", "compressed-tensors", "awq", "fp8"] = option(
        REQUIRED,
        "gguf: for llama.cpp; compressed-tensors: weights of the language model in 4 bits (W4A16, GPTQ); awq: in 4 bits with"
        " AWQ; fp8: in FP8, with activations in FP8 too",
    )
    output_dir: Path = option(REQUIRED, "a new or empty folder for the export", metavar="folder")
    gguf_type: Literal["f32", "f16", "bf16", "q8_0"] = option("f16", "gguf: precision of the weights")
    calibration_samples: int = option(
        128,
        "compressed-tensors and awq: most training rows to calibrate with; 0 rounds to nearest (compressed-tensors)",
        at_least=0,
    )
    split: str = option("test", "split whose rows are answered by both, slices allowed")
    max_samples: int | None = option(
        300, "most rows to answer, evenly spaced over the split", at_least=1, metavar="number"
    )
    max_loss: float = option(
        1.0, "points of accuracy that the export may lose; a larger loss with p below 0.05 fails the export", at_least=0
    )
    recipe_keys: dict[str, str] = recipe_keys(*KEYS)

    @property
    def calibrated(self) -> bool:
        """Return whether the format is one that rows calibrate."""
        return self.to in ("compressed-tensors", "awq")


@dataclass(frozen=True)
class ExportPlan:
    """An export that is ready to start: `evaluation` reads the rows, `engine` answers with the export.

    `model` is the folder of the whole model that is converted, and `adapter` that of an adapter on it, None without one.
    """

    options: ExportOptions
    engine: ServingEngine
    evaluation: EvaluationPlan
    model: Path
    adapter: Path | None

    @property
    def config(self) -> dict[str, Any]:
        """Return the configuration of the model that is converted."""
        found: dict[str, Any] = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        return found

    @property
    def failed_folder(self) -> Path:
        """Return where an export goes that is worse than the limit."""
        return self.options.output_dir.with_name(f"{self.options.output_dir.name}-failed")


def make_plan(options: ExportOptions) -> ExportPlan:
    """Read the model's run. Raises `UserError`; writes nothing."""
    from qwen_vl_sft.evaluation.options import EvaluateOptions, EvaluationPlan
    from qwen_vl_sft.inference.source import read_source
    from qwen_vl_sft.merging.plan import check_output_dir
    from qwen_vl_sft.serving.engines import llama_cpp, transformers

    if options.to != "gguf" and options.gguf_type != "f16":
        raise UserError(f"--gguf_type {options.gguf_type}: is for --to gguf; leave it out, or export with --to gguf")
    if options.calibration_samples != ExportOptions.calibration_samples and not options.calibrated:
        raise UserError(
            f"--calibration_samples {options.calibration_samples}: is for --to compressed-tensors and awq; leave it out"
        )
    if options.to == "awq" and not options.calibration_samples:
        raise UserError(
            "--calibration_samples 0: AWQ needs rows; give 1 or more, or export with --to compressed-tensors"
        )
    check_output_dir(options.output_dir)
    source = read_source(options.run, options.recipe_keys, tuned_needed=True)
    assert source.tuned
    adapter = source.tuned.folder if source.tuned.is_adapter else None
    if adapter and options.to != "gguf":
        raise UserError(
            f"--run: {options.run} holds an adapter, and --to {options.to} needs a whole model; merge it first: python"
            f" scripts/merge.py --run {options.run} --output_dir merged"
        )
    plan = EvaluationPlan(
        **vars(source),
        options=replace(
            EvaluateOptions(), run=options.run, arms=("tuned",), split=options.split, max_samples=options.max_samples
        ),
        output_dir=options.output_dir,
    )
    engine = llama_cpp.ENGINE if options.to == "gguf" else transformers.ENGINE
    failed = options.output_dir.with_name(f"{options.output_dir.name}-failed")
    if failed.exists():
        raise UserError(f"--output_dir: {failed} is there, of an export that failed; delete it, or name another folder")
    from qwen_vl_sft.merging.base import download

    return ExportPlan(options, engine, plan, download(source.recipe.model) if adapter else options.run, adapter)
