"""What `scripts/evaluate.py` is asked for: its command line, and the settings that follow from it and the run."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_vl_sft.config.settings import DataSettings, ModelSettings, RunSettings
from qwen_vl_sft.errors import UserError, raise_all

if TYPE_CHECKING:
    from qwen_vl_sft.config.reading import Recipe

ARMS = {
    "base": "the base model without a system message of ours",
    "prompted": "the base model with the run's system message",
    "tuned": "the run's adapter on the base model (or its full model), with its system message",
}
# Keys of a recipe that may be given on the command line, where they win over the run's recipe.
RECIPE_KEYS = (
    "model_name_or_path", "model_revision", "dtype", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type",
    "use_bnb_nested_quant", "attn_implementation", "trust_remote_code", "use_safetensors", "dataset_name",
    "dataset_config", "dataset_format", "system_message", "min_pixels", "max_pixels", "max_new_tokens",
    "use_cpu",
)  # fmt: skip
EVALUATION_KEYS = (*RECIPE_KEYS, "bad_rows")
# What concerns a model alone, with the defaults.
UNASKED = {"run": None, "arms": None, "split": "test", "max_samples": None, "batch_size": 8, "resume": False}
ADAPTER_FILE = "adapter_model.safetensors"
FULL_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class Options:
    """The command line. `recipe_keys` holds the keys of a recipe that were given, as they were written."""

    run: Path | None
    predictions: Path | None
    arms: tuple[str, ...] | None
    split: str
    max_samples: int | None
    batch_size: int
    output_dir: Path | None
    resume: bool
    overwrite: bool
    recipe_keys: dict[str, str]


@dataclass(frozen=True)
class TunedModel:
    """What a run has trained: `folder` holds an adapter or a full model, `home` the run's recipe beside it."""

    folder: Path
    home: Path
    is_adapter: bool


@dataclass(frozen=True)
class Source:
    """The models to answer with, and how they are asked: a run's, or a base model alone.

    `trained` holds the model settings of training, None without a run; `system_message` None what the rows' format says.
    """

    recipe: Recipe
    trained: ModelSettings | None
    tuned: TunedModel | None
    system_message: str | None


@dataclass(frozen=True)
class Plan(Source):
    """An evaluation that is ready to start, but for the rows."""

    options: Options
    output_dir: Path


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line. Wrong keys and values end in argparse's message, exit code 2."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Score a model on a split: base, prompted and tuned on the same rows.",
        epilog="Arms: " + "; ".join(f"{arm}: {text}" for arm, text in ARMS.items()) + ".",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", type=Path, help="run folder of scripts/sft.py, or a checkpoint in it; its recipe gives the defaults")
    add("--predictions", type=Path, help="score this file instead of a model: JSONL or JSON list of prediction, answer")
    add("--arms", type=names, help="some of base,prompted,tuned; default: all that the run allows")
    add("--split", default=UNASKED["split"], help="split to score, slices allowed (default: %(default)s)")
    add("--max_samples", type=positive, help="so many rows, evenly spread over the split; default: all")
    add(
        "--batch_size",
        type=positive,
        default=UNASKED["batch_size"],
        help="rows answered together (default: %(default)s)",
    )
    add(
        "--output_dir",
        type=Path,
        help="default: RUN/evaluation, or evaluation here; --predictions writes only if given",
    )
    add("--resume", action="store_true", help="go on with the evaluation in output_dir; arms may be added")
    add("--overwrite", action="store_true", help="replace the evaluation in output_dir")
    add_recipe_keys(parser, EVALUATION_KEYS)
    given = vars(parser.parse_args(arguments))
    keys = take_recipe_keys(given)
    return Options(**given, recipe_keys=keys)


def add_recipe_keys(parser: argparse.ArgumentParser, keys: Sequence[str]) -> None:
    """Let the command line give keys of a recipe; `take_recipe_keys` finds them."""
    group = parser.add_argument_group("keys of a recipe", "They win over the run's recipe.")
    groups = (ModelSettings, DataSettings, RunSettings)
    described = {entry.name: entry for settings in groups for entry in fields(settings)}
    for name in keys:
        entry = described.get(name)
        text = entry.metadata["help"] if entry else "compute on the CPU even if there is a GPU"
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if entry is None or entry.type == "bool" else {}
        group.add_argument(f"--{name}", help=text.replace("%", "%%"), **switch)


def take_recipe_keys(given: dict[str, Any]) -> dict[str, str]:
    """Move the recipe's keys out of the parsed command line, as they were written."""
    return {name: value for name in EVALUATION_KEYS if (value := given.pop(name, None)) is not None}


def check_options(options: Options) -> None:
    """Raise `UserError` with everything that cannot be meant, before anything is read or written."""
    problems = []
    if options.resume and options.overwrite:
        problems.append("--resume and --overwrite exclude each other; keep one")
    if options.predictions:
        given = [name for name, default in UNASKED.items() if getattr(options, name) != default]
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
    raise_all(problems + unknown_arms(options.arms or ()))


def unknown_arms(arms: Sequence[str]) -> list[str]:
    """A problem for each arm that does not exist."""
    problems = []
    for arm in arms:
        if arm not in ARMS:
            near = difflib.get_close_matches(arm, ARMS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(ARMS)}"
            problems.append(f"--arms: unknown arm {arm!r}; {hint}")
    return problems


def make_plan(options: Options) -> Plan:
    """Read the run and put the command line over its recipe. Raises `UserError`; writes nothing."""
    needed = options.arms is None or "tuned" in options.arms
    source = read_source(options.run, options.recipe_keys, needed)
    from qwen_vl_sft.evaluation.answer_files import check_output_dir

    output_dir = options.output_dir or (options.run / "evaluation" if options.run else Path("evaluation"))
    check_output_dir(output_dir, options)
    return Plan(**vars(source), options=options, output_dir=output_dir)


def read_source(run: Path | None, recipe_keys: Mapping[str, str], tuned_needed: bool) -> Source:
    """Read a run, if there is one, and put the keys of the command line over its recipe. Raises `UserError`."""
    from qwen_vl_sft.checkpointing.run_folder import RECIPE, SYSTEM_MESSAGE
    from qwen_vl_sft.config.reading import read_recipe

    tuned = find_tuned(run, tuned_needed) if run else None
    path = tuned.home / RECIPE if tuned else None
    recipe = read_recipe(path, recipe_keys)
    if recipe.model.load_in_4bit and recipe.model.load_in_8bit:
        raise UserError("load_in_4bit and load_in_8bit are both on; turn one off, e.g. --load_in_4bit false")
    if recipe.run.max_new_tokens < 1:
        raise UserError(
            f"max_new_tokens: {recipe.run.max_new_tokens} is below 1, so nothing would be answered; give more"
        )
    message = recipe_keys.get("system_message")
    if message is not None:
        check_text(message, "--system_message")
    elif tuned:
        file = tuned.home / SYSTEM_MESSAGE
        # As the command line is read: what is no UTF-8 becomes lone surrogates.
        message = file.read_text(encoding="utf-8", errors="surrogateescape") if file.exists() else ""
        check_text(message, str(file))
    return Source(recipe, read_recipe(path, {}).model if path else None, tuned, message)


def check_text(text: str, what: str) -> None:
    """Raise `UserError` for a text whose bytes were not UTF-8: Python keeps such as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8 text; write it in UTF-8") from None


def find_tuned(run: Path, needed: bool) -> TunedModel:
    """What is in a run folder, or in a checkpoint inside one. Raises `UserError` when it is no run or not finished."""
    from qwen_vl_sft.checkpointing.run_folder import RECIPE

    if not run.is_dir():
        near = sorted(str(path.parent) for path in run.parent.glob(f"*/{RECIPE}"))
        raise UserError(
            f"--run: {run} does not exist" + (f"; there are {', '.join(near)}" if near else "; train one first")
        )
    # A link to a checkpoint, or `.` inside one, tells its name when it is resolved.
    place = run if run.name.startswith("checkpoint-") else run.resolve()
    home = place.parent if place.name.startswith("checkpoint-") and not (run / RECIPE).is_file() else run
    if not (home / RECIPE).is_file():
        raise UserError(f"--run: {run} holds no {RECIPE}, so it is no run folder of scripts/sft.py; name one")
    is_adapter = (run / ADAPTER_FILE).is_file()
    if needed and not is_adapter and not any((run / name).is_file() for name in FULL_MODEL_FILES):
        checkpoints = sorted(run.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        instead = f"evaluate its checkpoint with --run {checkpoints[-1]}, " if checkpoints else ""
        raise UserError(
            f"--run: {run} holds neither {ADAPTER_FILE} nor a full model, so its training did not finish;"
            f" finish it, {instead}or score the base model alone with --arms base,prompted"
        )
    return TunedModel(run, home, is_adapter)


def tuned_settings(settings: ModelSettings, tuned: TunedModel) -> ModelSettings:
    """The model settings that the "tuned" arm loads from: those of the base under an adapter, else the run's own."""
    return (
        settings if tuned.is_adapter else replace(settings, model_name_or_path=str(tuned.folder), model_revision="main")
    )


def names(text: str) -> tuple[str, ...]:
    """Names between commas, each once, for argparse."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise argparse.ArgumentTypeError("names no arm")
    return found


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number
