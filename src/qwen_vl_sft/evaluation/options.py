"""Command-line options of evaluate.py, and the plan of an evaluation that follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_sft.config.command_line import names, option, recipe_keys
from qwen_vl_sft.errors import raise_all
from qwen_vl_sft.inference.source import RECIPE_KEYS, Source, read_source, unknown_arms

# Options that mean nothing where a file of predictions is scored.
QUANTIZED = ("load_in_4bit", "load_in_8bit")
MODEL_OPTIONS = (
    "run",
    "arms",
    "split",
    "max_samples",
    "batch_size",
    "cuda_graphs",
    "decode_kernel",
    "engine",
    "resume",
)


@dataclass(frozen=True)
class EvaluateOptions:
    """Command-line options of evaluate.py."""

    run: Path | None = option(
        None,
        "run folder of scripts/sft.py, or a checkpoint in it; its recipe gives the defaults",
        metavar="folder",
    )
    predictions: Path | None = option(
        None, "score this file instead of a model: JSONL or a JSON list of prediction and answer", metavar="file"
    )
    arms: tuple[str, ...] | None = option(
        None, "some of base,prompted,tuned; default: all that the run allows", parse=names
    )
    split: str = option("test", "split to score, slices allowed")
    max_samples: int | None = option(
        None, "most rows to answer, evenly spaced over the split; default: all", at_least=1
    )
    batch_size: int | None = option(
        None, "most rows answered at once; default: as many as pay off and memory holds", at_least=1
    )
    cuda_graphs: bool = option(True, "replay CUDA graphs for the tokens of answers; false computes each anew")
    decode_kernel: bool = option(
        True, "attend with a kernel of this package's for them; false takes PyTorch's attention"
    )
    engine: str | None = option(
        None, "another engine that answers, in an environment of its own: vllm; default: this package's", metavar="name"
    )
    output_dir: Path | None = option(
        None,
        "default: RUN/evaluation, or evaluation here; --predictions writes only if given",
        metavar="folder",
    )
    resume: bool = option(False, "continue the evaluation in output_dir; arms may be added")
    overwrite: bool = option(False, "replace the evaluation in output_dir")
    recipe_keys: dict[str, str] = recipe_keys(*RECIPE_KEYS, "bad_rows")


@dataclass(frozen=True)
class EvaluationPlan(Source):
    """A checked evaluation; its rows are not read yet."""

    options: EvaluateOptions
    output_dir: Path


def check_options(options: EvaluateOptions) -> None:
    """Raise `UserError` with every problem of the options, before anything is read or written."""
    problems = []
    if options.resume and options.overwrite:
        problems.append("--resume and --overwrite exclude each other; keep one")
    if options.predictions:
        default = EvaluateOptions()
        given = [name for name in MODEL_OPTIONS if getattr(options, name) != getattr(default, name)]
        if given := [f"--{name}" for name in (*given, *options.recipe_keys)]:
            problems.append(f"--predictions scores a whole file without a model; leave out {', '.join(given)}")
    elif options.run is None:
        needed = [name for name in ("model_name_or_path", "dataset_name") if name not in options.recipe_keys]
        if needed:
            problems.append(
                f"--run is missing: name a run folder, or give {' and '.join('--' + name for name in needed)}"
            )
        if "tuned" in (options.arms or ()):
            problems.append("--arms: tuned needs a run; give --run, or leave the arm out")
    if options.engine is not None:
        problems += _problems_of_engine(options)
    raise_all(problems + unknown_arms(options.arms or ()))


def _problems_of_engine(options: EvaluateOptions) -> Iterator[str]:
    for key in QUANTIZED:
        if options.recipe_keys.get(key, "false").lower() not in ("false", "no", "off"):
            yield f"--{key}: --engine {options.engine} answers with 16-bit weights; leave it out"
    if options.batch_size is not None:
        yield f"--batch_size: --engine {options.engine} chooses it itself; leave it out"
    if options.recipe_keys.get("enable_thinking"):
        yield "--enable_thinking: another engine's thoughts are not scored; leave --engine out"


def make_plan(options: EvaluateOptions) -> EvaluationPlan:
    """Read the run and override its recipe from the command line. Raises `UserError`; writes nothing."""
    needed = options.arms is None or "tuned" in options.arms
    # Other engines take the weights of a base in 16 bits, and an adapter of any base on them.
    unquantized = dict.fromkeys(QUANTIZED, "false") if options.engine else {}
    source = read_source(options.run, {**options.recipe_keys, **unquantized}, needed)
    from qwen_vl_sft.evaluation.answer_files import check_output_dir

    output_dir = options.output_dir or (options.run / "evaluation" if options.run else Path("evaluation"))
    check_output_dir(output_dir, in_use_allowed=options.resume or options.overwrite)
    return EvaluationPlan(**vars(source), options=options, output_dir=output_dir)
