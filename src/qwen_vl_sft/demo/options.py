"""Command-line options of demo.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qwen_vl_sft.config.command_line import REQUIRED, option, recipe_keys, size
from qwen_vl_sft.errors import raise_all
from qwen_vl_sft.inference.source import RECIPE_KEYS

# Each run has its own system message, which the page can edit; one for all runs would hide them.
KEYS = tuple(name for name in RECIPE_KEYS if name != "system_message")
LOCAL = "127.0.0.1"


@dataclass(frozen=True)
class DemoOptions:
    """Command-line options of demo.py; `max_file_size` in bytes."""

    run: tuple[Path, ...] = option(
        REQUIRED, "run folders to choose from, all of the same base model", metavar="folder ..."
    )
    examples: int = option(4, "rows of the run's data to try; 0 for none")
    max_file_size: int = option(10 * 10**6, "largest file that can be uploaded", parse=size, shown="10M")
    queue: int = option(20, "most requests that wait; one is answered at a time", at_least=1)
    share: bool = option(False, "open the page to everyone who has its address, through a tunnel of Gradio's")
    server_name: str = option(LOCAL, "address to listen at; default: only this machine")
    server_port: int | None = option(None, "default: the first free one from 7860", at_least=1)
    export_space: Path | None = option(
        None, "write a Hugging Face Space into a new folder instead of serving", metavar="folder"
    )
    recipe_keys: dict[str, str] = recipe_keys(*KEYS)


def check_options(options: DemoOptions) -> None:
    """Raise `UserError` with every problem of the options, before anything is read."""
    problems = []
    if len({path.resolve() for path in options.run}) < len(options.run):
        problems.append("--run names a folder twice; name each once")
    if options.examples < 0:
        problems.append(f"--examples {options.examples} is below 0; give 0 for none")
    if options.server_port is not None and options.server_port > 65535:
        problems.append(f"--server_port {options.server_port} is not a port; give one up to 65535")
    if options.export_space and options.share:
        problems.append("--export_space writes a folder and serves nothing; leave out --share")
    raise_all(problems)
