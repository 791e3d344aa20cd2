"""The checks of a machine: each asks for some facts and yields what it found, with the cure of a problem."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from qwen_vl_sft.compat.tested_versions import TESTED, untested_versions
from qwen_vl_sft.diagnosis.machine import Machine, Probe
from qwen_vl_sft.errors import first_line

GIB = 2**30
OK, NOTE, PROBLEM = "ok", "note", "problem"
OPTIONAL = {"deepspeed": "deepspeed", "liger-kernel": "kernels", "fla-core": "linear", "flash-attn-4": "flash"}
PYTHONS = ((3, 11), (3, 12))
# Workers hand batches over in shared memory: some images and their patches, for each worker twice.
_SHARED_LEAST = GIB
# A 7B in bfloat16 has 15.4 GiB.
_DISK_LEAST = 20 * GIB


@dataclass(frozen=True)
class Finding:
    """What a check found: its subject, "ok", "note" or "problem", the facts, and the cure of a problem."""

    subject: str
    state: str
    text: str
    cure: str = ""


def check_versions(machine: Machine) -> Iterator[Finding]:
    """Compare Python and libraries with the tested versions."""
    version = tuple(map(int, machine.python.split(".")[:2]))
    supported = " or ".join(".".join(map(str, one)) for one in PYTHONS)
    if version in PYTHONS:
        yield Finding("python", OK, f"{machine.python}, {machine.system}")
    else:
        yield Finding("python", PROBLEM, f"{machine.python}, {machine.system}", f"use Python {supported}")

    def installed(package: str) -> str:
        found = machine.version(package)
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    untested = {warning.split()[0]: warning for warning in untested_versions(installed)}
    for package, (first, end) in TESTED.items():
        found = machine.version(package)
        if found is None and package in OPTIONAL:
            extra = OPTIONAL[package]
            yield Finding(package, NOTE, f"not installed; pip install 'qwen_vl_sft[{extra}]' brings it")
        elif found is None:
            yield Finding(package, PROBLEM, "not installed", f"pip install '{package}>={first},<{end}'")
        elif package in untested:
            cure = f"pip install '{package}>={first},<{end}'"
            yield Finding(package, PROBLEM, f"{found}; tested is {first}, below {end}", cure)
        else:
            yield Finding(package, OK, found)


def check_gpus(machine: Machine) -> Iterator[Finding]:
    """Tell GPUs, driver and the memory that others use."""
    try:
        gpus = machine.gpus()
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            yield Finding("GPUs", NOTE, "none: nvidia-smi is not here, so everything runs on the CPU")
        else:
            cure = "load or reinstall the driver, and in a container start it with --gpus all"
            yield Finding("GPUs", PROBLEM, f"nvidia-smi fails: {first_line(error)}", cure)
        return
    if not gpus:
        yield _no_gpu_is_seen(str(machine.get("CUDA_VISIBLE_DEVICES", "")).strip())
        return
    names = sorted({gpu.name for gpu in gpus})
    text = f"{len(gpus)} x {', '.join(names)}, {gpus[0].memory / 1024:.1f} GiB, driver {gpus[0].driver}"
    yield Finding("GPUs", OK if len(names) == 1 else NOTE, text)
    busy = [f"{gpu.number} ({gpu.used / 1024:.1f} GiB)" for gpu in gpus if gpu.used > 0.05 * gpu.memory]
    if busy:
        cure = "end what nvidia-smi lists there, or leave them out with CUDA_VISIBLE_DEVICES"
        yield Finding("GPU memory", PROBLEM, f"GPU {', '.join(busy)} is in use by others", cure)


def _no_gpu_is_seen(chosen: str) -> Finding:
    if chosen in ("", "-1"):
        return Finding("GPUs", NOTE, "none, so everything runs on the CPU")
    cure = "write numbers of GPUs as nvidia-smi lists them, such as 0,1, or unset it"
    return Finding(
        "GPUs", PROBLEM, f"CUDA_VISIBLE_DEVICES={chosen} names no GPU of this machine: all runs on the CPU", cure
    )


def check_shared_memory(machine: Machine) -> Iterator[Finding]:
    """Tell whether data loader workers can hand over their batches."""
    found = machine.shared_memory()
    cores = machine.cores()
    if found is None:
        yield Finding("shared memory", NOTE, f"no /dev/shm; {cores} CPU cores")
        return
    total, free = found
    text = f"/dev/shm {_gib(total)}, {_gib(free)} free; {cores} CPU cores"
    if total < _SHARED_LEAST:
        cure = "start the container with --shm-size=16g or --ipc=host, or set dataloader_num_workers: 0"
        yield Finding(
            "shared memory",
            PROBLEM,
            f"{text}: data loaders will wait for ever, or their workers be killed (Bus error)",
            cure,
        )
    elif free < _SHARED_LEAST / 4:
        yield Finding("shared memory", PROBLEM, f"{text}: full", "remove what ended jobs left in /dev/shm")
    else:
        yield Finding("shared memory", OK, text)


def check_disk(machine: Machine) -> Iterator[Finding]:
    """Tell whether models can be downloaded, runs be written, and how much room there is."""
    places = {"HF_HOME": machine.hub_home, "this folder": Path.cwd()}
    for name, folder in places.items():
        refused = machine.refusal_to_write(folder)
        if refused:
            cure = "export HF_HOME=/a/folder/of/yours" if name == "HF_HOME" else "start in a folder of yours"
            yield Finding(name, PROBLEM, f"{folder} cannot be written: {refused}", cure)
            continue
        free = machine.free_bytes(folder)
        text = f"{folder}, {_gib(free)} free"
        if free < _DISK_LEAST:
            cure = "free space, or name another disk" + (" with HF_HOME" if name == "HF_HOME" else " with output_dir")
            yield Finding(name, NOTE if free > GIB else PROBLEM, f"{text}: little for a model of 7B", cure)
        else:
            yield Finding(name, OK, text)


def check_hub(machine: Machine) -> Iterator[Finding]:
    """Tell whether the Hub can be reached, and what the token may do."""
    if str(machine.get("HF_HUB_OFFLINE", "")).lower() in {"1", "true", "yes", "on"}:
        yield Finding("Hub", NOTE, "HF_HUB_OFFLINE is set: only what is on this machine is used")
        return
    try:
        token = machine.token()
    except Exception as error:  # of the connection, the Hub and its client, which raise a dozen kinds
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            yield Finding("Hub", PROBLEM, "refuses the token on this machine", "hf auth login")
        else:
            cure = "check the network and proxies; with models and data on this machine set HF_HUB_OFFLINE=1"
            yield Finding("Hub", PROBLEM, f"cannot be reached: {first_line(error)}", cure)
        return
    if token is None:
        yield Finding("Hub", NOTE, "no token: enough for open models; hf auth login before you push")
    elif token.role == "read":
        yield Finding("Hub", OK, "reached; the token reads, which is not enough to push")
    else:
        yield Finding("Hub", OK, f"reached; the token's role is {token.role}")


def check_environment(machine: Machine) -> Iterator[Finding]:
    """Tell the variables that change how runs start; their values only where these are no secrets."""
    shown = ("CUDA_VISIBLE_DEVICES", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS")
    found = [f"{name}={machine.get(name)}" for name in shown if machine.get(name) is not None]
    if found:
        yield Finding("variables", NOTE, ", ".join(found))


_CURES = {
    "torch": "reinstall PyTorch for your driver: https://pytorch.org/get-started/locally",
    "attention": "set attn_implementation: sdpa, or reinstall the package that is named",
    "kernels": "leave fused_kernels out, or pip install 'qwen_vl_sft[kernels]'",
    "bitsandbytes": f"pip install 'bitsandbytes>={TESTED['bitsandbytes'][0]},<{TESTED['bitsandbytes'][1]}'",
    "deepspeed": "pip install 'qwen_vl_sft[deepspeed]', or use ddp and fsdp2, which need none",
    "nccl": "set NCCL_DEBUG=INFO to see why; NCCL_P2P_DISABLE=1 or NCCL_IB_DISABLE=1 leave a faulty link out",
    "fp8": "use another precision",
    "workers": "set dataloader_num_workers: 0, or give the container more shared memory",
    "training": "run `make quickstart` and send what it prints",
    "patches": "install the tested versions",
}


def check_runs(machine: Machine) -> Iterator[Finding]:
    """Try what training needs in small runs."""
    for probe in machine.probes(list(_CURES)):
        yield of_probe(probe)


def of_probe(probe: Probe) -> Finding:
    """Return the finding of a small run."""
    state = {"ok": OK, "absent": NOTE}.get(probe.outcome, PROBLEM)
    return Finding(f"run: {probe.name}", state, probe.text, _CURES.get(probe.name, "") if state == PROBLEM else "")


CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (
    check_versions,
    check_gpus,
    check_shared_memory,
    check_disk,
    check_hub,
    check_environment,
    check_runs,
)


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.0f} MiB"
