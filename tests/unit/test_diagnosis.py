"""The page about a machine: facts that tests put in place of this one's, faults made on purpose, and small runs."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from qwen_vl_sft.compat.tested_versions import TESTED
from qwen_vl_sft.diagnosis import probes
from qwen_vl_sft.diagnosis.checks import (
    GIB,
    NOTE,
    OK,
    PROBLEM,
    Finding,
    check_disk,
    check_environment,
    check_gpus,
    check_hub,
    check_runs,
    check_shared_memory,
    check_versions,
    of_probe,
)
from qwen_vl_sft.diagnosis.machine import Gpu, Machine, Probe, Token, _refusal_to_write, run_probes, visible
from qwen_vl_sft.diagnosis.report import clean, format_end, format_line

GOOD = {package: first for package, (first, _) in TESTED.items()}


def machine(**changed):
    """A machine on which all is well."""
    facts = {
        "version": GOOD.get,
        "gpus": lambda: [Gpu("NVIDIA H200", "580.1", 143771, 4)],
        "shared_memory": lambda: (64 * GIB, 64 * GIB),
        "refusal_to_write": lambda folder: None,
        "free_bytes": lambda folder: 500 * GIB,
        "token": lambda: Token("write"),
        "cores": lambda: 16,
        "probes": lambda names: iter(Probe(name, "ok", "works") for name in names),
        "environment": {},
        "python": "3.12.3",
    }
    return Machine(**{**facts, **changed})


def problems(check, **changed):
    return [finding for finding in check(machine(**changed)) if finding.state == PROBLEM]


@pytest.mark.parametrize(
    "check",
    [check_versions, check_gpus, check_shared_memory, check_disk, check_hub, check_environment, check_runs],
    ids=lambda check: check.__name__,
)
def test_nothing_is_found_on_a_machine_on_which_all_is_well(check):
    assert not problems(check)


def test_old_bitsandbytes_is_named_with_its_cure():
    (found,) = problems(check_versions, version={**GOOD, "bitsandbytes": "0.41.0"}.get)
    assert found.subject == "bitsandbytes"
    assert found.text == "0.41.0; tested is 0.50.2, below 0.51"
    assert found.cure == "pip install 'bitsandbytes>=0.50.2,<0.51'"


def test_what_is_missing_is_a_problem_only_where_it_is_needed():
    missing = {"version": {name: version for name, version in GOOD.items() if name not in ("torch", "deepspeed")}.get}
    (found,) = problems(check_versions, **missing)
    assert (found.subject, found.text) == ("torch", "not installed")
    notes = [one.text for one in check_versions(machine(**missing)) if one.state == NOTE]
    assert notes == ["not installed; pip install 'qwen_vl_sft[deepspeed]' brings it"]
    (found,) = problems(check_versions, python="3.9.1")
    assert found.cure == "use Python 3.11 or 3.12"


def test_little_shared_memory_is_told_with_its_cure():
    (found,) = problems(check_shared_memory, shared_memory=lambda: (64 * 2**20, 64 * 2**20))
    assert found.text.startswith("/dev/shm 64 MiB, 64 MiB free; 16 CPU cores: data loaders will wait for ever")
    assert "--shm-size" in found.cure
    (found,) = problems(check_shared_memory, shared_memory=lambda: (64 * GIB, 0))
    assert "remove what ended jobs left" in found.cure


def test_a_folder_that_cannot_be_written_is_told_with_its_cure():
    refuse = {"refusal_to_write": lambda folder: "Read-only file system" if "hf" in str(folder) else None}
    (found,) = problems(check_disk, environment={"HF_HOME": "/mnt/hf"}, **refuse)
    assert found.text == "/mnt/hf cannot be written: Read-only file system"
    assert found.cure.startswith("export HF_HOME=")


def test_folders_are_really_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert _refusal_to_write(tmp_path / "new/folder") is None
    assert _refusal_to_write(tmp_path / "file/folder") == "Not a directory"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk():
    assert len(problems(check_disk, free_bytes=lambda folder: GIB // 2)) == 2
    assert not problems(check_disk, free_bytes=lambda folder: 5 * GIB)
    assert {found.state for found in check_disk(machine(free_bytes=lambda folder: 5 * GIB))} == {NOTE}


def test_drivers():
    def fails():
        raise ValueError("Failed to initialize NVML: Driver/library version mismatch")

    def lacks():
        raise FileNotFoundError("nvidia-smi")

    (found,) = problems(check_gpus, gpus=fails)
    assert "version mismatch" in found.text
    assert not problems(check_gpus, gpus=lacks)
    for chosen, count in (("", 0), ("-1", 0), ("banana", 1), ("7", 1)):
        found = problems(check_gpus, gpus=list, environment={"CUDA_VISIBLE_DEVICES": chosen})
        assert len(found) == count
        assert all(chosen in one.text and "unset" in one.cure for one in found)
    (found,) = problems(
        check_gpus, gpus=lambda: [Gpu("NVIDIA L4", "5", 23034, 20), Gpu("NVIDIA L4", "5", 23034, 9000, 1)]
    )
    assert found.text == "GPU 1 (8.8 GiB) is in use by others"


@pytest.mark.parametrize(
    ("chosen", "numbers"),
    [
        (None, [0, 1, 2]),
        ("1", [1]),
        (" 2, 0", [2, 0]),
        ("1,7,0", [1]),  # CUDA reads no further
        ("", []),
        ("-1", []),
        ("GPU-b4,GPU-a", [1]),
        ("GPU-a111-22", [0]),
        ("MIG-c", [0, 1, 2]),
    ],
)
def test_gpus_that_processes_do_not_see_are_not_looked_at(chosen, numbers):
    assert visible([(0, "GPU-a111-2222"), (1, "GPU-b444-5555"), (2, "GPU-a999-0000")], chosen) == numbers


def test_the_hub():
    def gone():
        raise OSError("Name or service not known")

    def refused():
        answer = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co"))
        raise HfHubHTTPError("Invalid user token.", response=answer)

    def mistyped():
        raise httpx.InvalidURL("Invalid port: 'notaport'")  # of a proxy

    for unreached in (gone, mistyped):
        (found,) = problems(check_hub, token=unreached)
        assert "HF_HUB_OFFLINE=1" in found.cure
    (found,) = problems(check_hub, token=refused)
    assert found.cure == "hf auth login"
    assert [one.state for one in check_hub(machine(token=gone, environment={"HF_HUB_OFFLINE": "1"}))] == [NOTE]
    assert next(check_hub(machine(token=lambda: None))).state == NOTE
    assert "not enough to push" in next(check_hub(machine(token=lambda: Token("read")))).text


def test_no_secret_is_shown():
    environment = {"HF_TOKEN": "hf_abcdefgh1234", "WANDB_API_KEY": "0123456789abcdef", "TOKENIZERS_PARALLELISM": "no"}
    text = "hf_abcdefgh1234 and 0123456789abcdef at https://me:secret@proxy and hf_otherother in /home/jane/x; no more"
    found = clean(Finding("s", PROBLEM, text, "see /home/jane"), environment, Path("/home/jane"))
    assert found.text == "*** and *** at https***proxy and *** in ~/x; no more"
    assert found.cure == "see ~"
    assert len(clean(Finding("s", OK, "x" * 5000), {}, Path("/")).text) <= 200
    shown = check_environment(machine(environment={**environment, "CUDA_VISIBLE_DEVICES": "0,1"}))
    assert [one.text for one in shown] == ["CUDA_VISIBLE_DEVICES=0,1"]


def test_lines_fit_the_terminal():
    found = Finding("shared memory", PROBLEM, "word " * 30, "cure " * 30)
    lines = format_line(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("! shared memory")
    assert format_end([found, found]) == "2 problems"
    assert format_end([]) == "no problem was found"


def test_a_run_that_fails_has_its_cure():
    found = of_probe(Probe("bitsandbytes", "failed", "OSError: libcudart.so"))
    assert found == Finding(
        "run: bitsandbytes", PROBLEM, "OSError: libcudart.so", "pip install 'bitsandbytes>=0.50.2,<0.51'"
    )
    assert of_probe(Probe("fp8", "absent", "no GPU")).state == NOTE
    assert of_probe(Probe("torch", "ok", "works")) == Finding("run: torch", OK, "works")


ANSWERS = """
import json, os, signal, sys, time
for name in sys.argv[1:]:
    if name == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hang": time.sleep(60)
    if name == "leave": sys.exit("no library")
    print("noise", flush=True)
    print(json.dumps({"name": name, "outcome": "ok", "text": "works"}), flush=True)
"""


def test_a_run_that_crashes_or_hangs_ends_no_other():
    command = [sys.executable, "-S", "-c", ANSWERS]
    found = list(run_probes(["one", "crash", "two", "leave", "hang", "three"], command, seconds=3))
    assert [(one.name, one.outcome) for one in found] == [
        ("one", "ok"),
        ("crash", "failed"),
        ("two", "ok"),
        ("leave", "failed"),
        ("hang", "failed"),
        ("three", "ok"),
    ]
    assert [one.text for one in found if one.outcome == "failed"] == [
        "its process was ended by signal 11",
        "its process ended with code 1: no library",
        "did not end within 3 s",
    ]


@pytest.mark.parametrize("name", ["torch", "attention", "kernels", "bitsandbytes", "training"])
def test_small_runs_work_here(name):
    found = probes.outcome_of(name)
    assert found["outcome"] == "ok", found
    assert json.loads(json.dumps(found)) == found


def test_what_a_library_raises_is_the_outcome(monkeypatch):
    def fails():
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setitem(probes.PROBES, "torch", fails)
    assert probes.outcome_of("torch") == {
        "name": "torch",
        "outcome": "failed",
        "text": "RuntimeError: no kernel image is available",
    }


def test_a_wrong_product_fails(monkeypatch):
    import bitsandbytes
    import torch

    class Wrong(torch.nn.Linear):
        def __init__(self, inputs, outputs, bias, compute_dtype, quant_type):
            super().__init__(inputs, outputs, bias)
            self.register_parameter("weight", None)

        def forward(self, inputs):
            return inputs[:, :128] * 2

    monkeypatch.setattr(bitsandbytes.nn, "Linear4bit", Wrong)
    monkeypatch.setattr(bitsandbytes.nn, "Params4bit", lambda weight, **options: torch.nn.Parameter(weight))
    found = probes.outcome_of("bitsandbytes")
    assert found["outcome"] == "failed"
    assert "a product with a 4-bit weight is" in found["text"]


def test_this_machine_can_be_asked():
    here = Machine()
    assert here.cores() >= 1
    assert here.shared_memory() is None or here.shared_memory()[0] > 0
    assert here.free_bytes(Path("/nowhere/at/all")) > 0
    assert here.version("torch")
    assert here.version("no-such-package") is None
    if shutil.which("nvidia-smi") is None:
        with pytest.raises(FileNotFoundError):
            here.gpus()
