"""What `scripts/demo.py` is asked for: its command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen_vl_sft.errors import raise_all
from qwen_vl_sft.evaluation.options import RECIPE_KEYS, add_recipe_keys, positive, take_recipe_keys

# Each run has a system message of its own, and one that is given for all would hide them; the page edits it.
KEYS = tuple(name for name in RECIPE_KEYS if name != "system_message")
LOCAL = "127.0.0.1"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Options:
    """The command line. `max_file_size` in bytes; `recipe_keys` holds the keys of a recipe that were given."""

    run: tuple[Path, ...]
    examples: int = 4
    max_file_size: int = 10 * 10**6
    queue: int = 20
    share: bool = False
    server_name: str = LOCAL
    server_port: int | None = None
    export_space: Path | None = None
    recipe_keys: dict[str, str] | None = None


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line. Wrong keys and values end in argparse's message, exit code 2."""
    parser = argparse.ArgumentParser(
        prog="demo.py",
        description="A page that answers questions about images with the base model and a tuned one, side by side.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--run", type=Path, nargs="+", required=True, help="run folders to choose from, all of the same base model")
    add(
        "--examples", type=int, default=Options.examples, help="rows of the run's data to try (%(default)s; 0 for none)"
    )
    add("--max_file_size", type=_size, default="10M", help="largest file that is taken (%(default)s)")
    add("--queue", type=positive, default=Options.queue, help="most requests that wait (%(default)s); one is answered")
    add(
        "--share",
        action="store_true",
        help="open the page to everyone who has its address, through a tunnel of Gradio's",
    )
    add("--server_name", default=LOCAL, help="address to listen at (%(default)s: this machine alone)")
    add("--server_port", type=positive, help="default: the first free one from 7860")
    add(
        "--export_space",
        type=Path,
        metavar="DIR",
        help="write a Hugging Face Space into a new folder instead of serving",
    )
    add_recipe_keys(parser, KEYS)
    given = vars(parser.parse_args(arguments))
    keys = take_recipe_keys(given)
    return Options(**given | {"run": tuple(given["run"])}, recipe_keys=keys)


def check_options(options: Options) -> None:
    """Raise `UserError` with everything that cannot be meant, before anything is read."""
    problems = []
    if len({path.resolve() for path in options.run}) < len(options.run):
        problems.append("--run names a folder twice; name each once")
    if options.examples < 0:
        problems.append(f"--examples {options.examples} is below 0; give 0 for none")
    if options.server_port is not None and options.server_port > 65535:
        problems.append(f"--server_port {options.server_port} is no port; give one up to 65535")
    if options.export_space and options.share:
        problems.append("--export_space writes a folder and serves nothing; leave out --share")
    raise_all(problems)


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500K, 10M or a number of bytes")
    return size
