"""Command-line options of generate.py, and the questions that it answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_sft.config.command_line import names, option, recipe_keys
from qwen_vl_sft.errors import UserError, raise_all
from qwen_vl_sft.inference.source import ARMS, RECIPE_KEYS, check_text, unknown_arms

# A question brings its own images, so no dataset is read.
KEYS = tuple(name for name in RECIPE_KEYS if not name.startswith("dataset_"))


@dataclass(frozen=True)
class GenerateOptions:
    """Command-line options of generate.py."""

    run: Path | None = option(
        None,
        "run folder of scripts/sft.py, or a checkpoint in it; its recipe gives the defaults",
        metavar="folder",
    )
    images: tuple[str, ...] = option(
        (), "image files, shown to the model in this order before the question", metavar="file ..."
    )
    question: str | None = option(
        None, "default: every line of the standard input is one, about the same images", metavar="text"
    )
    arms: tuple[str, ...] | None = option(
        None, "some of base,prompted,tuned; default: tuned with --run, else base", parse=names
    )
    json: bool = option(False, "print each answer as one line of JSON when it is finished")
    recipe_keys: dict[str, str] = recipe_keys(*KEYS)


def check_options(options: GenerateOptions) -> None:
    """Raise `UserError` with every problem of the options, before anything is read."""
    problems = []
    if options.run is None:
        if "model_name_or_path" not in options.recipe_keys:
            problems.append("--run is missing: name a run folder, or only a base model with --model_name_or_path")
        if "tuned" in (options.arms or ()):
            problems.append("--arms: tuned needs a run; give --run, or leave the arm out")
    if not options.images:
        problems.append("--images is missing: name one image file or more")
    if options.question is not None and not options.question.strip():
        problems.append("--question is empty; write one, or leave it out to type questions")
    raise_all(problems + unknown_arms(options.arms or ()))
    check_text(options.question or "", "--question")


def choose_arms(options: GenerateOptions, system_message: str | None) -> tuple[str, ...]:
    """Return the arms of --arms, else tuned with a run, prompted with a system message, or base. Raises `UserError`."""
    if options.arms is None:
        return ("tuned" if options.run else "prompted" if system_message else "base",)
    if "prompted" in options.arms and not system_message:
        raise UserError("--arms: prompted needs a system message, and there is none; give --system_message")
    return tuple(arm for arm in ARMS if arm in options.arms)


def read_questions(options: GenerateOptions) -> Iterator[str]:
    """Yield the question of the command line, else the lines of the standard input."""
    if options.question is not None:
        yield options.question
        return
    found = False
    if sys.stdin.isatty():
        print("A question a line; end with Ctrl-D.", file=sys.stderr)
    while True:
        if sys.stdin.isatty():
            print("question: ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise UserError("the standard input is not UTF-8 text; write it in UTF-8") from None
        if not line:
            break
        line = line if found else line.removeprefix("\ufeff")
        if line.strip():
            check_text(line, "the standard input")
            found = True
            yield line.strip()
    if not found:
        raise UserError("--question is missing, and the standard input holds none; give one")
