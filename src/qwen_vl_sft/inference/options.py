"""What `scripts/generate.py` is asked for: its command line and the questions."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_sft.errors import UserError, raise_all
from qwen_vl_sft.evaluation.options import ARMS, RECIPE_KEYS, add_recipe_keys, check_text, names, take_recipe_keys
from qwen_vl_sft.evaluation.options import unknown_arms as problems_of_arms

# A question brings its own images, so no data set is read.
KEYS = tuple(name for name in RECIPE_KEYS if not name.startswith("dataset_"))


@dataclass(frozen=True)
class Options:
    """The command line. `recipe_keys` holds the keys of a recipe that were given, as they were written."""

    run: Path | None
    images: tuple[str, ...]
    question: str | None
    arms: tuple[str, ...] | None
    json: bool
    recipe_keys: dict[str, str]


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line. Wrong keys and values end in argparse's message, exit code 2."""
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Answer a question about images with the base model, the tuned one, or both.",
        epilog="Arms: " + "; ".join(f"{arm}: {text}" for arm, text in ARMS.items()) + ".",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", type=Path, help="run folder of scripts/sft.py, or a checkpoint in it; its recipe gives the defaults")
    add("--images", nargs="+", default=(), help="image files, shown to the model in this order before the question")
    add("--question", help="default: every line of the standard input is one, about the same images")
    add("--arms", type=names, help="some of base,prompted,tuned; default: tuned with --run, else base")
    add("--json", action="store_true", help="print each answer as one line of JSON when it is finished")
    add_recipe_keys(parser, KEYS)
    given = vars(parser.parse_args(arguments))
    keys = take_recipe_keys(given)
    return Options(**given | {"images": tuple(given["images"])}, recipe_keys=keys)


def check_options(options: Options) -> None:
    """Raise `UserError` with everything that cannot be meant, before anything is read."""
    problems = []
    if options.run is None:
        if "model_name_or_path" not in options.recipe_keys:
            problems.append("--run is missing: name a run folder, or a base model alone with --model_name_or_path")
        if "tuned" in (options.arms or ()):
            problems.append("--arms: tuned needs a run; give --run, or leave the arm out")
    if not options.images:
        problems.append("--images is missing: name one image file or more")
    if options.question is not None and not options.question.strip():
        problems.append("--question is empty; write one, or leave it out to type questions")
    raise_all(problems + problems_of_arms(options.arms or ()))
    check_text(options.question or "", "--question")


def choose_arms(options: Options, system_message: str | None) -> tuple[str, ...]:
    """The arms asked for, else the one that the command line describes best. Raises `UserError`."""
    if options.arms is None:
        return ("tuned" if options.run else "prompted" if system_message else "base",)
    if "prompted" in options.arms and not system_message:
        raise UserError("--arms: prompted needs a system message, and there is none; give --system_message")
    return tuple(arm for arm in ARMS if arm in options.arms)


def read_questions(options: Options) -> Iterator[str]:
    """The question of the command line, else the lines of the standard input up to its end."""
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
