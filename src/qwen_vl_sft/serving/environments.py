"""The Python environment of each engine: made once from its pinned requirements, and kept in the user's cache.

An engine needs other versions of PyTorch and transformers than training, so it never shares its environment.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_vl_sft.cache_folder import cache_folder
from qwen_vl_sft.errors import UserError, shortened
from qwen_vl_sft.serving.base import REQUIREMENTS, ServingEngine

# Written last; a folder without it was not finished.
COMPLETE = "complete.json"
_CPU_BUILD = "+cpu"
# Bytes that must be free: the packages, and pip's copies of the largest while it unpacks them.
NEEDED_BYTES = 10 * 10**9


def environment_folder(engine: ServingEngine) -> Path:
    """Return the folder of an engine's environment; another one for other requirements or another Python."""
    text = (REQUIREMENTS / engine.requirements).read_bytes()
    digest = hashlib.sha256(text + sys.version.encode()).hexdigest()[:12]
    return cache_folder("engines") / f"{engine.name}-{digest}"


def python_of(engine: ServingEngine) -> Path:
    """Return the Python of an engine's environment. Raises `UserError` where it was not made yet."""
    folder = environment_folder(engine)
    if not (folder / COMPLETE).is_file():
        raise UserError(
            f"--engine: {engine.title} is not installed in {folder}; make its environment with"
            f" python scripts/engine_environment.py --engine {engine.name}"
        )
    return _ready(engine, folder)


def make_environment(engine: ServingEngine, say: Callable[[str], None] = lambda text: None) -> Path:
    """Make an engine's environment unless it is there, and return its Python. Raises `UserError`.

    `say` is told each step. Two processes that make it at once wait for each other.
    """
    folder = environment_folder(engine)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock")):
            if not (folder / COMPLETE).is_file():
                _make(engine, folder, say)
            return _ready(engine, folder)
    except OSError as error:
        raise UserError(f"--engine: {folder} cannot be written ({error.strerror or error}); free space") from error


def _ready(engine: ServingEngine, folder: Path) -> Path:
    if engine.before_use is not None:
        engine.before_use(_site_packages(folder))
    return folder / "bin/python"


def _make(engine: ServingEngine, folder: Path, say: Callable[[str], None]) -> None:
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        raise UserError(
            f"--engine: {engine.title} needs {NEEDED_BYTES / 1e9:.0f} GB free while it is installed, and the disk of"
            f" {folder.parent} has {free / 1e9:.1f}; free some, or set XDG_CACHE_HOME to a folder on another disk"
        )
    say(f"making    {folder}")
    _run(engine, [sys.executable, "-m", "venv", str(folder)])
    python = folder / "bin/python"
    requirements = (REQUIREMENTS / engine.requirements).read_text(encoding="utf-8").splitlines()
    packages = [line.strip() for line in requirements if line.strip() and not line.startswith("#")]
    cpu_builds = [line for line in packages if line.partition(";")[0].strip().endswith(_CPU_BUILD)]
    for package in cpu_builds:
        _install_cpu_build(engine, python, package, say)
    others = [line for line in packages if line not in cpu_builds]
    say(f"packages  {len(others)} of {engine.requirements}")
    _pip(engine, python, "--no-deps", *others)
    if engine.after_install is not None:
        engine.after_install(_site_packages(folder))
    seconds, size = time.monotonic() - began, _size(folder)
    details = {"engine": engine.name, "seconds": round(seconds), "bytes": size}
    (folder / COMPLETE).write_text(json.dumps(details) + "\n", encoding="utf-8")
    say(f"made in   {seconds:.0f} s, {size / 1e9:.1f} GB")


def _install_cpu_build(engine: ServingEngine, python: Path, package: str, say: Callable[[str], None]) -> None:
    """Install PyTorch's build for CPUs, or where pip does not find it the one for GPUs with its libraries."""
    say(f"packages  {package}")
    try:
        _pip(engine, python, "--no-deps", package)
    except UserError:
        plain = package.replace(_CPU_BUILD, "")
        say(f"          is not found by pip; {plain} instead, with the libraries of CUDA")
        _pip(engine, python, plain)


def _pip(engine: ServingEngine, python: Path, *arguments: str) -> None:
    _run(engine, [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])


def _run(engine: ServingEngine, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        why = shortened(lines[-1]) if lines else f"exit code {done.returncode}"
        raise UserError(f"--engine: {engine.title} could not be installed: {why}; check the network, and try again")


def _site_packages(folder: Path) -> Path:
    return folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
