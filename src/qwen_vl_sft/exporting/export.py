"""Export a model, answer the same rows with the original and with the export, and keep it only where it answers as well."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qwen_vl_sft.atomic_write import writing_to
from qwen_vl_sft.checkpointing.run_folder import RECIPE, SYSTEM_MESSAGE
from qwen_vl_sft.distributed.context import read_context
from qwen_vl_sft.errors import BadRow, UserError, shortened
from qwen_vl_sft.evaluation.clusters import compare_clustered, number_clusters
from qwen_vl_sft.evaluation.metrics import Comparison
from qwen_vl_sft.evaluation.scoring import score_row, summarise
from qwen_vl_sft.evaluation.task import WAY_OUT, Prompts, Task, prepare
from qwen_vl_sft.exporting.adapter import write_pairs
from qwen_vl_sft.exporting.calibration import write_calibration
from qwen_vl_sft.exporting.options import ExportPlan
from qwen_vl_sft.inference.generation import decode_answer
from qwen_vl_sft.inference.models import load_arm, make_encoder
from qwen_vl_sft.merging.folder import PROCESSOR_FILES
from qwen_vl_sft.serving.base import EngineAnswer, Served
from qwen_vl_sft.serving.check import Asked, ask
from qwen_vl_sft.serving.engines.llama_cpp import MODEL_FILE, image_tokens
from qwen_vl_sft.serving.environments import make_environment
from qwen_vl_sft.serving.exported import ADAPTER_GGUF, REPORT_FILE
from qwen_vl_sft.serving.own_answers import own_answers
from qwen_vl_sft.serving.process import EngineFailed, EngineProcess, EngineRefused, last_line

CONVERTERS = Path(__file__).parent / "workers"
SCHEMES = {"compressed-tensors": "W4A16", "awq": "AWQ", "fp8": "FP8"}
# The exit code of workers/to_gguf.py for a tokenizer whose splits llama.cpp has no name for.
UNKNOWN_TOKENIZER = 3
ORIGINAL, EXPORT = "original", "export"
# Metrics by which an export is judged, the first that the rows have.
METRICS = ("relaxed_accuracy", "mean_iou")
ROWS_AT_ONCE = 16
COMPANIONS = (*PROCESSOR_FILES, SYSTEM_MESSAGE, RECIPE, "generation_config.json")


@dataclass(frozen=True)
class Judged:
    """What the rows say of an export: the loss in points, whether it is more than luck, and what is wrong."""

    metric: str
    comparison: Comparison
    problems: list[str]


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
    with writing_to(output, "nothing was left there. Free space, or name another folder"):
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-exporting-", dir=output.parent))
    try:
        say(f"converting {plan.model} to {plan.options.to}")
        calibrated = convert(plan, task, python, folder)
        if pairs:
            run_converter(plan, python, "adapter_to_gguf.py", [pairs, folder / MODEL_FILE, folder / ADAPTER_GGUF])
        write_companions(plan, folder)
        report, judged = compare(plan, task, python, folder, say)
        report["calibration_rows"] = calibrated
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        folder.chmod(0o755)
        target = plan.failed_folder if judged.problems else plan.options.output_dir
        with writing_to(target, "nothing was left there. Free space, or name another folder"):
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


def served_by(plan: ExportPlan, folder: Path, processor: Any) -> Served:
    """Return the export as the engine serves it."""
    size = processor.image_processor.size
    limits = {name: int(size[name]) for name in ("shortest_edge", "longest_edge") if size.get(name)}
    adapter = folder / ADAPTER_GGUF if plan.adapter else None
    return Served(folder, plan.evaluation.recipe.model.dtype, adapter, limits=limits if plan.engine.gguf else {})


def compare(
    plan: ExportPlan, task: Task, python: Path, folder: Path, say: Callable[[str], None]
) -> tuple[dict[str, Any], Judged]:
    """Answer the rows with the original and with the export. Raises `UserError` where the export cannot be asked."""
    encoder = make_encoder(plan.evaluation, "tuned", task.processor, task.system_message)
    prompts, most = Prompts(task.rows, encoder), plan.evaluation.recipe.run.max_new_tokens
    served = served_by(plan, folder, task.processor)
    own_arguments = plan.engine.arguments(served)
    with tempfile.TemporaryDirectory() as place:
        try:
            asked = ask(task, prompts, encoder, Path(place), most)
        except BadRow as error:
            raise UserError(f"{error}; {WAY_OUT}") from None
        arguments = [*own_arguments, *plan.engine.check_arguments(served, asked.size)]
        log = Path(place) / "engine.log"
        theirs: dict[int, EngineAnswer] = {}
        try:
            with EngineProcess(plan.engine, python, served, arguments, log) as engine:
                with tqdm(total=len(asked.prompts), desc=EXPORT, unit="row") as progress:
                    for start in range(0, len(asked.prompts), ROWS_AT_ONCE):
                        batch = asked.prompts[start : start + ROWS_AT_ONCE]
                        for answer in engine.answer(batch, plan.adapter is not None, most, encoder.template_options):
                            theirs[answer.number] = answer
                        progress.update(len(batch))
                versions = engine.versions
        except (EngineRefused, EngineFailed) as error:
            raise UserError(f"--to {plan.options.to}: {plan.engine.title} does not serve the export: {error}") from None
    model = load_arm(plan.evaluation, "tuned", None, read_context(bool(plan.evaluation.recipe.get("use_cpu"))))
    ours = own_answers(model, encoder, prompts.encode, task.units, most, ORIGINAL)
    texts = {number: decode_answer(encoder, tokens) for number, tokens in ours.items()}
    rows = [
        score_row(
            question,
            {
                ORIGINAL: prompts.in_data_coordinates(number, texts[number]),
                EXPORT: prompts.in_data_coordinates(number, theirs[number].text),
            },
        )
        for number, question in enumerate(task.questions)
    ]
    judged = judge(plan, task, rows, asked, theirs)
    images = {question.row_id: shown for question, shown in zip(task.questions, task.images, strict=True)}
    summary = summarise(rows, [ORIGINAL, EXPORT], images)
    report = {
        "to": plan.options.to,
        "model": str(plan.options.run.resolve()),
        "adapter": plan.adapter is not None,
        "precision": plan.options.gguf_type if plan.options.to == "gguf" else SCHEMES[plan.options.to],
        "original_precision": plan.evaluation.recipe.model.precision,
        "versions": versions,
        "arguments": own_arguments,
        "image_tokens": image_tokens(plan.config, served.limits) if served.limits else None,
        "dataset": task.rows.name,
        "rows": len(rows),
        "same_answers": sum(row["arms"][ORIGINAL]["answer"] == row["arms"][EXPORT]["answer"] for row in rows),
        "same_prompt_lengths": sum(len(asked.prompt_ids[n]) == theirs[n].prompt_tokens for n in theirs),
        "bytes": {"original": size_of(plan.options.run), "export": size_of(folder)},
        "metric": judged.metric,
        "scores": summary["scores"],
        "comparison": asdict(judged.comparison),
        "max_loss": plan.options.max_loss,
        "problems": judged.problems,
        "differing": [row for row in rows if row["arms"][ORIGINAL]["answer"] != row["arms"][EXPORT]["answer"]][:20],
    }
    return report, judged


def judge(
    plan: ExportPlan, task: Task, rows: list[dict[str, Any]], asked: Asked, theirs: Mapping[int, EngineAnswer]
) -> Judged:
    """Judge an export by prompts of the same length and by the accuracy of the same rows, images counting as one draw."""
    metric = next(name for name in METRICS if any(name in row["arms"][ORIGINAL] for row in rows))
    having = [number for number, row in enumerate(rows) if metric in row["arms"][ORIGINAL]]
    scores = [[float(rows[number]["arms"][arm][metric]) for number in having] for arm in (ORIGINAL, EXPORT)]
    images = number_clusters([task.images[number] for number in having])
    comparison = compare_clustered(scores[0], scores[1], images)
    problems = []
    other = [number for number, answer in theirs.items() if answer.prompt_tokens != len(asked.prompt_ids[number])]
    if other:
        ids, answer = asked.prompt_ids[other[0]], theirs[other[0]]
        problems.append(
            f"{len(other)} of {len(rows)} prompts have other tokens, the first {answer.prompt_tokens} for {len(ids)}"
        )
    loss = -100 * comparison.difference.mean
    if loss > plan.options.max_loss and comparison.p_value < 0.05:
        problems.append(
            f"{metric} is {loss:.1f} points lower (p = {comparison.p_value:.3g}), more than --max_loss"
            f" {plan.options.max_loss:g}"
        )
    return Judged(metric, comparison, problems)


def size_of(folder: Path) -> int:
    """Return the bytes of the weight files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))


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
