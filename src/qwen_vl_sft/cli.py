"""The console command `qwen_vl_sft`: run a script of the package from any folder, on one process or many.

    qwen_vl_sft sft --recipe quickstart.yaml
    qwen_vl_sft sft --accelerate_config ddp --num_processes 8 --recipe chartqa_qlora.yaml
    qwen_vl_sft evaluate --run runs/chartqa_qlora

The command replaces itself by `python scripts/NAME.py`, or by `accelerate launch ... scripts/NAME.py` when a launch
option is given, so that signals, exit codes and what the script reads of its launcher are those of the plain command.
"""

from __future__ import annotations

import ast
import difflib
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from qwen_vl_sft.errors import UserError, exits_with_user_errors
from qwen_vl_sft.shipped_files import FOLDERS, SCRIPTS, copy_files, launch_config, require_root, script

# Scripts that several processes can run. The others run in one.
LAUNCHED = ("sft", "evaluate")
# The scripts of everyday use, in the order they are used; --help lists the others after them.
FIRST = ("sft", "evaluate", "generate", "demo", "merge", "push")
DEFAULT_CONFIG = "ddp"
CONFIG_OPTION = "accelerate_config"
# Options of `accelerate launch` that are passed on; no key of a recipe has such a name.
LAUNCH_OPTIONS = (
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "gpu_ids",
    "rdzv_backend",
    "deepspeed_hostfile",
    "deepspeed_multinode_launcher",
)
OWN_COMMANDS = {
    "files": "List the recipes, launch configurations, Slurm jobs and scripts that come with the package.",
    "copy": f"Copy them into a folder, to change them or to submit the Slurm jobs: copy DIR [{' | '.join(FOLDERS)}].",
}
USAGE = """\
usage: qwen_vl_sft COMMAND [--key value ...]
       qwen_vl_sft COMMAND --help
"""
LAUNCHING = f"""\
Options of {" and ".join(LAUNCHED)} that start several processes
  --{CONFIG_OPTION} NAME   a file, or the name of a shipped one, such as
                             ddp, zero2, fsdp2, cpu (default: {DEFAULT_CONFIG})
  --num_processes N          processes in all (default: what the file says)
"""
EXAMPLES = """\
Examples
  qwen_vl_sft sft --recipe quickstart.yaml --dry_run
  qwen_vl_sft sft --accelerate_config ddp --num_processes 8 \\
      --recipe chartqa_qlora.yaml --learning_rate 1e-4
  qwen_vl_sft evaluate --num_processes 8 --run runs/chartqa_qlora
"""


@exits_with_user_errors
def main() -> None:
    """Run the command of the command line; it takes the place of this process."""
    words = sys.argv[1:]
    if not words or words[0] in {"-h", "--help", "help"}:
        print(format_help())
    elif words[0] == "files":
        print(format_files())
    elif words[0] == "copy":
        print(copy(words[1:]))
    else:
        command = build_command(words[0], words[1:])
        sys.stdout.flush()
        os.execv(command[0], command)


def scripts() -> list[str]:
    """Return the names of the shipped scripts, the most used ones first."""
    names = sorted(path.stem for path in (require_root() / SCRIPTS).glob("*.py"))
    return [name for name in FIRST if name in names] + [name for name in names if name not in FIRST]


def build_command(name: str, words: Sequence[str]) -> list[str]:
    """Return the command that runs a script with `words`: with Python, or with `accelerate launch`.

    Raises `UserError` for a name that is no command, and for launch options of a script that runs in one process.
    """
    known = [*scripts(), *OWN_COMMANDS]
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
        raise UserError(f"unknown command {name}; {hint}")
    launch, rest = split_launch_options(words)
    path = str(script(name))
    if not launch:
        return [sys.executable, path, *rest]
    if name not in LAUNCHED:
        raise UserError(f"--{next(iter(launch))}: {name} runs in one process; leave the option out")
    config = launch_config(launch.pop(CONFIG_OPTION, DEFAULT_CONFIG))
    options = [word for option, value in launch.items() for word in (f"--{option}", value)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*launcher, *options, path, *rest]


def split_launch_options(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split a command line into the launch options with their values, and the words that go to the script.

    Raises `UserError` for a launch option without a value, and for one given twice.
    """
    launch: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(words)
    for word in waiting:
        name, assigned, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in (CONFIG_OPTION, *LAUNCH_OPTIONS):
            rest.append(word)
            continue
        if name in launch:
            raise UserError(f"command line: --{name} is given twice; keep one")
        launch[name] = value if assigned else next(waiting, "")
        if not launch[name] or launch[name].startswith("--"):
            raise UserError(f"command line: --{name} needs a value")
    return launch, rest


def copy(words: Sequence[str]) -> str:
    """Copy the shipped folders named after the target, or all, and return what was done. Raises `UserError`."""
    if not words or any(word.startswith("-") for word in words):
        raise UserError(f"copy: write copy DIR, or copy DIR and some of {', '.join(FOLDERS)}")
    new = copy_files(Path(words[0]), list(words[1:]) or FOLDERS)
    return "\n".join(map(str, new)) or f"{words[0]} holds these files already"


def format_files() -> str:
    """Format the folder of the shipped files and their names, in 80 columns."""
    root = require_root()
    lines = [str(root)]
    for folder in FOLDERS:
        lines += _entry(f"{folder}/", " ".join(sorted(path.name for path in (root / folder).glob("*.*"))), 22)
    return "\n".join(lines)


def format_help() -> str:
    """Return --help: every command with the first sentence of its script, in 80 columns."""
    lines = []
    for name in scripts():
        lines += _entry(name, _first_paragraph(script(name)), 22)
    for name, text in OWN_COMMANDS.items():
        lines += _entry(name, text, 22)
    return "\n".join([USAGE, "Commands", *lines, "", LAUNCHING, EXAMPLES]).rstrip()


def _first_paragraph(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def _entry(name: str, text: str, column: int) -> list[str]:
    """Return a name and its text, which starts in `column` and is wrapped there."""
    first, *others = textwrap.wrap(text, 79 - column, break_on_hyphens=False) or [""]
    start = f"  {name:<{column - 4}}  "
    if len(start) > column:
        start = f"  {name}\n{'':<{column}}"
    return [start + first, *(f"{'':<{column}}{line}" for line in others)]


if __name__ == "__main__":
    main()
