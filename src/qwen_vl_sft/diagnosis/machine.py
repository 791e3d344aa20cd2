"""The facts that checks ask for, each by a function of its own, so that a test can put others in their place."""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from qwen_vl_sft.cpu_cores import usable_cores

SHARED_MEMORY = Path("/dev/shm")
PROBE_SECONDS = 180.0


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it; `number` is the driver's, memory in MiB."""

    name: str
    driver: str
    memory: int
    used: int
    number: int = 0


@dataclass(frozen=True)
class Token:
    """What the Hub says of the token on this machine; no part of the token or of a name."""

    role: str


@dataclass(frozen=True)
class Probe:
    """The outcome of a small run: "ok", "absent" where it does not apply, or "failed", with what was seen."""

    name: str
    outcome: str
    text: str


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[Gpu]:
    """Ask nvidia-smi for the GPUs that processes see. Raises `OSError` where there is none, `ValueError` where it fails."""
    fields = "index,uuid,name,driver_version,memory.total,memory.used"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if found.returncode:
        raise ValueError((found.stdout + found.stderr).strip().splitlines()[0] if found.stdout + found.stderr else "")
    lines = [[part.strip() for part in line.split(",")] for line in found.stdout.splitlines() if line.strip()]
    seen = visible([(int(line[0]), line[1]) for line in lines], os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [
        Gpu(name, driver, int(memory), int(used), int(number))
        for number, _, name, driver, memory, used in lines
        if int(number) in seen
    ]


def visible(gpus: Sequence[tuple[int, str]], chosen: str | None) -> list[int]:
    """Return the numbers of the GPUs, given by number and UUID, that CUDA_VISIBLE_DEVICES leaves: all where it is not set.

    CUDA reads its entries up to the first that names no GPU. A UUID may be cut short; parts of a GPU (MIG) stand for all.
    """
    numbers = [number for number, _ in gpus]
    if chosen is None or "MIG-" in chosen:
        return numbers
    found = []
    for entry in (part.strip() for part in chosen.split(",")):
        named = [number for number, uuid in gpus if entry == str(number) or (len(entry) > 4 and uuid.startswith(entry))]
        if len(named) != 1:
            break
        found += named
    return found


def _shared_memory() -> tuple[int, int] | None:
    """Return the bytes of shared memory in all and free, None where this system has none."""
    if not SHARED_MEMORY.is_dir():
        return None
    usage = shutil.disk_usage(SHARED_MEMORY)
    return usage.total, usage.free


def _refusal_to_write(folder: Path) -> str | None:
    """Return why nothing can be written into a folder or where it would be made, None when it can."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".qwen_vl_sft-"):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__


def _free_bytes(folder: Path) -> int:
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def _token() -> Token | None:
    """Ask the Hub about the token of this machine; None without one. Raises what its client raises."""
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token:
        return None
    access = HfApi(token=token).whoami().get("auth", {}).get("accessToken", {})
    return Token(str(access.get("role", "unknown")))


def run_probes(names: Sequence[str], command: Sequence[str] = (), seconds: float = PROBE_SECONDS) -> Iterator[Probe]:
    """Run probes in another process, which a crash may end: the next ones then run in a new one.

    `command` starts that process, which takes names and prints a line of JSON for each; a probe has `seconds`.
    """
    waiting = list(names)
    start = list(command or (sys.executable, "-m", "qwen_vl_sft.diagnosis.probes"))
    while waiting:
        process = subprocess.Popen([*start, *waiting], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            for found in _answers(process, seconds):
                waiting.remove(found.name)
                yield found
            if waiting:
                yield Probe(waiting.pop(0), "failed", _end_of(process, seconds))
        finally:
            process.kill()
            process.communicate()


def _answers(process: subprocess.Popen[bytes], seconds: float) -> Iterator[Probe]:
    assert process.stdout is not None
    descriptor, ends, rest = process.stdout.fileno(), time.monotonic() + seconds, b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, ends - time.monotonic()))
        content = os.read(descriptor, 65536) if ready else b""
        if not content:
            return
        *lines, rest = (rest + content).split(b"\n")
        for line in lines:
            if line.startswith(b'{"name"'):
                yield Probe(**json.loads(line))
                ends = time.monotonic() + seconds


def _end_of(process: subprocess.Popen[bytes], seconds: float) -> str:
    """Return how a process ended that did not answer."""
    try:
        code = process.wait(1)
    except subprocess.TimeoutExpired:
        return f"did not end within {seconds:.0f} s"
    if code < 0:
        return f"its process was ended by signal {-code}"
    assert process.stderr is not None
    lines = process.stderr.read().decode(errors="replace").strip().splitlines()
    return f"its process ended with code {code}: {lines[-1] if lines else 'without a word'}"


@dataclass(frozen=True)
class Machine:
    """This machine, or what a test makes of one."""

    version: Callable[[str], str | None] = _version
    gpus: Callable[[], list[Gpu]] = _gpus
    shared_memory: Callable[[], tuple[int, int] | None] = _shared_memory
    refusal_to_write: Callable[[Path], str | None] = _refusal_to_write
    free_bytes: Callable[[Path], int] = _free_bytes
    token: Callable[[], Token | None] = _token
    cores: Callable[[], int] = usable_cores
    probes: Callable[[Sequence[str]], Iterator[Probe]] = run_probes
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    python: str = platform.python_version()
    system: str = f"{platform.system()} {platform.release()}"
    home: Path = field(default_factory=Path.home)

    @property
    def hub_home(self) -> Path:
        """Return the folder of models and data from the Hub."""
        cache = self.environment.get("XDG_CACHE_HOME") or str(self.home / ".cache")
        stated = self.environment.get("HF_HOME") or f"{cache}/huggingface"
        return Path(stated.replace("~", str(self.home), 1) if stated.startswith("~") else stated)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a variable of the environment."""
        return self.environment.get(name, default)
