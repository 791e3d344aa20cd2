"""The request to `accelerate launch`, read from the command line of the process that started this one.

The launcher passes on only what it made of the request; that it was asked for something else shows nowhere else.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# A launcher between the script and an `accelerate launch` further up was asked for something of its own.
OTHER_LAUNCHERS = {"torchrun", "deepspeed", "torch.distributed.run", "torch.distributed.launch"}
KIND_FLAGS = {"multi_gpu": "MULTI_GPU", "tpu": "XLA", "use_deepspeed": "DEEPSPEED", "use_fsdp": "FSDP"}


@dataclass(frozen=True)
class Process:
    """The command line of a process, and the folder that relative paths in it start from."""

    argv: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class LauncherRequest:
    """A request to `accelerate launch`; `None` where it names nothing and accelerate chooses.

    `kind` is a name of accelerate's `DistributedType`. `source` says where the request stands, for messages.
    """

    source: str
    kind: str | None
    processes: int | None
    on_cpu: bool
    cpu_flag: bool = False


def ancestors() -> Iterator[Process]:
    """Return the processes above this one, nearest first, without those that may not be inspected."""
    try:
        parents = psutil.Process().parents()
    except psutil.Error:
        return
    for process in parents:
        try:
            yield Process(tuple(process.cmdline()), Path(process.cwd()))
        except psutil.Error:
            continue


def read_launcher_request(chain: Iterable[Process] | None = None) -> LauncherRequest | None:
    """Return the request to the `accelerate launch` above this process; `None` if there is none, or a nearer launcher."""
    for process in ancestors() if chain is None else chain:
        arguments = _launch_arguments(process.argv)
        if arguments is not None:
            return _read_request(arguments, process.folder)
        if any(Path(word).name in OTHER_LAUNCHERS for word in process.argv[:3]):
            return None
    return None


def _launch_arguments(argv: tuple[str, ...]) -> list[str] | None:
    """Return what follows `accelerate launch` in a command line, also behind `python -m`, `uv run`, `timeout` and such."""
    for index, word in enumerate(argv):
        name = Path(word).name
        if name == "accelerate-launch" or word == "accelerate.commands.launch":
            return list(argv[index + 1 :])
        following = argv[index + 1] if index + 1 < len(argv) else None
        if following == "launch" and (name == "accelerate" or word == "accelerate.commands.accelerate_cli"):
            return list(argv[index + 2 :])
    return None


def _read_request(arguments: list[str], folder: Path) -> LauncherRequest | None:
    """Resolve flags first, then the configuration file, as in accelerate's own `_validate_launch_command`."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        flags: argparse.Namespace = launch_command_parser().parse_args(arguments)
    except SystemExit:  # not the launcher's own command line after all: the launcher would have ended on it
        return None
    kind = next((kind for flag, kind in KIND_FLAGS.items() if getattr(flags, flag, False)), None)
    processes, on_cpu = flags.num_processes, bool(flags.cpu)
    sources = [f"`--{name}`" for name in ("cpu", "num_processes", *KIND_FLAGS) if getattr(flags, name, None)]

    file = flags.config_file
    if file is None and os.path.isfile(default_config_file) and not flags.cpu:
        file = default_config_file
    if file is not None:
        try:
            config = load_config_from_file(str(folder / file))
        except (OSError, ValueError, TypeError):  # accelerate has read it before; it was changed since
            return None
        kind = kind or str(getattr(config.distributed_type, "value", config.distributed_type))
        processes = processes if processes is not None else getattr(config, "num_processes", None)
        on_cpu = on_cpu or bool(config.use_cpu)
        sources.append(f"{file}")
    source = f"accelerate launch ({', '.join(sources)})" if sources else "accelerate launch"
    return LauncherRequest(source, kind, processes, on_cpu, bool(flags.cpu))
