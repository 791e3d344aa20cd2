"""Export a model: convert it, have it compared with the original, and keep it only where it answers as well."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_vl_sft.atomic_write import writing_to
from qwen_vl_sft.checkpointing.run_folder import RECIPE, SYSTEM_MESSAGE
from qwen_vl_sft.errors import UserError, shortened
from qwen_vl_sft.evaluation.task import Task, prepare
from qwen_vl_sft.exporting.adapter import write_pairs
from qwen_vl_sft.exporting.calibration import write_calibration
from qwen_vl_sft.exporting.comparison import EXPORT, ORIGINAL, compare
from qwen_vl_sft.exporting.options import SCHEMES, ExportPlan
from qwen_vl_sft.inference.models import make_encoder
from qwen_vl_sft.merging.folder import PROCESSOR_FILES
from qwen_vl_sft.serving.engines.llama_cpp import MODEL_FILE
from qwen_vl_sft.serving.environments import make_environment
from qwen_vl_sft.serving.exported import ADAPTER_GGUF, REPORT_FILE
from qwen_vl_sft.serving.process import last_line

CONVERTERS = Path(__file__).parent / "workers"
# The exit code of workers/to_gguf.py for a tokenizer whose splits llama.cpp has no name for.
UNKNOWN_TOKENIZER = 3
COMPANIONS = (*PROCESSOR_FILES, SYSTEM_MESSAGE, RECIPE, "generation_config.json")
_NOTHING_LEFT = "nothing was left there. Free space, or name another folder"


def export(plan: ExportPlan, say: Callable[[str], None] = tqdm.write) -> dict[str, Any]:
    """Export, compare and move to the output folder, or to `failed_folder`; return the report. Raises `UserError`."""
    task = prepare(plan.evaluation)
    with tempfile.TemporaryDirectory() as place:
        pairs = Path(place) / "pairs.safetensors"
        if plan.adapter:
            write_pairs(plan.evaluation.recipe.model, plan.model, plan.adapter, pairs)
        return _export(plan, task, pairs if plan.adapter else None, say)


def _export(plan: ExportPlan, task: Task, pairs: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Export; `pairs` are the matrices of the adapter, None without one."""
    python = make_environment(plan.engine, say=say)
    output = plan.options.output_dir.resolve()
    with writing_to(output, _NOTHING_LEFT):
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-exporting-", dir=output.parent))
    try:
        say(f"converting {plan.model} to {plan.options.to}")
        calibrated = convert(plan, task, python, folder)
        if pairs:
            run_converter(plan, python, "adapter_to_gguf.py", [pairs, folder / MODEL_FILE, folder / ADAPTER_GGUF])
        with writing_to(output, _NOTHING_LEFT):
            write_companions(plan, folder)
        report, judged = compare(plan, task, python, folder)
        report["calibration_rows"] = calibrated
        target = plan.failed_folder if judged.problems else plan.options.output_dir
        with writing_to(target, _NOTHING_LEFT):
            (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            folder.chmod(0o755)
            os.replace(folder, target.resolve())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report | {"folder": str(target)}


def convert(plan: ExportPlan, task: Task, python: Path, folder: Path) -> int:
    """Convert the model, and return with how many rows it was calibrated. Raises `UserError`."""
    with tempfile.TemporaryDirectory() as place:
        # Without the run's recipe: llm-compressor would take a file of that name for its own.
        source = Path(place) / "model"
        source.mkdir()
        for path in plan.model.iterdir():
            if path.is_file() and path.name not in (RECIPE, REPORT_FILE):
                (source / path.name).symlink_to(path.resolve())
        if plan.options.to == "gguf":
            run_converter(plan, python, "to_gguf.py", [source, folder, plan.options.gguf_type])
            return 0
        rows, written = Path(place) / "rows", 0
        rows.mkdir()
        if plan.options.calibrated and plan.options.calibration_samples:
            encoder = make_encoder(plan.evaluation, "tuned", task.processor, task.system_message)
            written = write_calibration(plan.evaluation, encoder, plan.options.calibration_samples, rows)
        run_converter(plan, python, "compress.py", [source, folder, SCHEMES[plan.options.to], rows])
        return written


def run_converter(plan: ExportPlan, python: Path, script: str, words: Sequence[str | Path]) -> None:
    """Run a converter in its own environment. Raises `UserError` with what it said last."""
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        with log.open("wb") as file:
            done = subprocess.run(
                [str(python), str(CONVERTERS / script), *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**environment, "HF_HUB_OFFLINE": "1"},
                cwd=place,
                check=False,
            )
        if done.returncode == UNKNOWN_TOKENIZER and script == "to_gguf.py":
            raise UserError(
                f"--run: the tokenizer of {plan.model} is not known to llama.cpp's converter, and splits text in another way"
                f" than Qwen2's; take the tokenizer of a model that llama.cpp knows, or export with --to compressed-tensors"
            )
        if done.returncode:
            raise UserError(
                f"--to {plan.options.to}: {plan.model} could not be converted: {shortened(last_line(log))}; serve the"
                f" {'adapter' if plan.adapter else 'merged model'} as it is"
            )


def write_companions(plan: ExportPlan, folder: Path) -> None:
    """Write processor, prompt and recipe; for GGUF also the configuration, of which the limits of images are computed."""
    for name in COMPANIONS:
        if (plan.options.run / name).is_file():
            shutil.copyfile(plan.options.run / name, folder / name)
    if plan.options.to == "gguf":
        shutil.copyfile(plan.model / "config.json", folder / "config.json")


def format_report(report: Mapping[str, Any]) -> str:
    """Format the table that ends an export."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    size, comparison = report["bytes"], report["comparison"]
    rows = f", calibrated with {report['calibration_rows']} training rows" if report["calibration_rows"] else ""
    lines = [
        f"export     {report['to']}, {report['precision']}{rows} ({versions})",
        f"size       {size['original'] / 1e6:,.1f} MB, exported {size['export'] / 1e6:,.1f} MB",
        f"prompts    {report['same_prompt_lengths']} of {report['rows']} of the same length",
        f"answers    {report['same_answers']} of {report['rows']} the same",
    ]
    for arm in (ORIGINAL, EXPORT):
        cell = report["scores"][arm]["all"][report["metric"]]
        mean, low, high = (100 * cell[name] for name in ("mean", "low", "high"))
        lines.append(f"{arm:<10} {report['metric']} {mean:.1f} [{low:.1f}, {high:.1f}]")
    difference = comparison["difference"]
    lines.append(
        f"difference {100 * difference['mean']:+.1f} [{100 * difference['low']:+.1f}, {100 * difference['high']:+.1f}],"
        f" p = {comparison['p_value']:.3g}; at most {report['max_loss']:g} points may be lost"
    )
    if report["image_tokens"]:
        options = " ".join((["--lora", ADAPTER_GGUF] if report["adapter"] else []) + report["arguments"])
        lines += [
            "",
            "The mmproj file does not hold the limits of image sizes. Give them to llama.cpp:",
            f"    llama-server -m model.gguf --mmproj mmproj.gguf {options}",
        ]
    lines += [f"FAILED     {problem}" for problem in report["problems"]]
    return "\n".join(lines)
